"""One update: equal for every micro-batch, and every trap on the way from a batch to a step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

import dgpo.training.forward_rounds
from dgpo.algorithms import AWM, DGPO, DiffusionNFT
from dgpo.core.groups import Groups
from dgpo.core.points import Forward
from dgpo.core.process import FlowMatching, Level
from dgpo.core.timesteps import TimestepChoice
from dgpo.distributed.processes import Processes
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.prompts import Prompt
from dgpo.recipe import Recipe
from dgpo.recipe.sections import EmaSettings
from dgpo.rewards import load_rewards
from dgpo.rewards.shipped.stand_in import brightness
from dgpo.training.batch import Batch
from dgpo.training.collector import Collector
from dgpo.training.forward_rounds import old_is_policy
from dgpo.training.updater import SCALE_GROWS, NonFinite, Updater
from families.tiny import sd3_small
from tiny_runs import PROMPTS, Calls, Spy, settings

SIZE, COUNT = 8, 2


class Case:
    """A policy that has moved away from its reference, and a batch of two groups of eight."""

    def __init__(self, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
        algorithm = {"timesteps": {"count": 1, "indices": (0, 2)}, **changes.pop("algorithm", {})}
        data = settings(group_size=SIZE, groups_per_iteration=COUNT, **changes)
        self.recipe = Recipe.from_dict({**data, "algorithm": Spy(**algorithm)})
        pipe = sd3_small().to(dtype)
        self.model = PipelineModel(pipe, call=self.recipe.rollout.call)
        self.policy = Policy(self.model, self.recipe.lora, seed=0)
        generator = torch.Generator().manual_seed(1)
        for tensor in (*self.policy.parameters(), *self.policy.old.tensors):
            tensor.data += 0.05 * torch.randn(tensor.shape, generator=generator).to(dtype)
        self.updater = Updater(self.policy, self.recipe)
        groups = Groups.contiguous(COUNT, SIZE)
        rewards = torch.randn(COUNT * SIZE, generator=generator)
        self.batch = Batch(
            x0=torch.randn(COUNT * SIZE, 4, 8, 8, generator=generator).to(dtype),
            prompts=self.model.encode(PROMPTS[:COUNT], guidance=True),
            levels=self.levels(),
            advantages=self.recipe.algorithm.advantages(rewards, groups),
            groups=groups,
            positions=torch.arange(COUNT * SIZE),
            total=COUNT * SIZE,
        )
        self.model.has_guidance(self.batch.prompts)  # finds out by a call of its own
        Spy.seen.clear()

    def levels(self) -> list[Level]:
        """Of three Euler steps with shift 3."""
        sigmas = [3 * s / (1 + 2 * s) for s in (1.0, 0.5005, 0.001)]
        return [Level(torch.tensor(1000 * s), s) for s in sigmas]

    def gradients(self, batch: Batch | None = None) -> list[Tensor]:
        """Those of one optimiser step."""
        found: list[Tensor] = []

        def keep(*_: Any) -> None:
            found.extend(p.grad.clone() for p in self.policy.parameters() if p.grad is not None)

        handle = self.updater.optimizer.register_step_pre_hook(keep)
        self.updater.update(batch or self.batch, iteration=0)
        handle.remove()
        return found


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference, relative to the largest gradient."""
    assert len(a) == len(b) > 0
    largest = max(float(x.abs().max()) for x in a)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / largest


FREE: dict[str, Any] = {"lr": 1e-3, "max_grad_norm": 1e9}  # clipping would hide a wrong scale


def test_gradients_are_summed_over_the_processes_once_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many micro-batches it has; the denoiser is the pipeline's own, and no wrapper."""
    sums: list[int] = []
    monkeypatch.setattr(Processes, "sum_gradients", lambda _, weights: sums.append(len(weights)))
    case = Case(train={"micro_batch": 3})
    case.updater.update(case.batch, iteration=0)
    assert case.updater.step == 1 and sums == [len(case.policy.parameters())]
    assert list(case.model.denoisers.values()) == [case.model.pipe.transformer]
    assert type(case.model.pipe.transformer) is SD3Transformer2DModel


MODES: dict[str, dict[str, Any]] = {
    "reference": {"loss_scale": "reference"},
    "paper": {"loss_scale": "paper"},
    "ema-guided": {"reference": "ema", "kl_cfg": 2.0},
}


@pytest.mark.parametrize("mode", MODES)
def test_the_micro_batch_changes_nothing(mode: str) -> None:
    """In float64, where the sums over a group, which nearly cancel, leave digits to compare."""

    def case(**train: Any) -> Case:
        return Case(torch.float64, algorithm=MODES[mode], lora=None, train={**FREE, **train})

    whole = case().gradients()
    for size in (SIZE, 3, 1):
        assert difference(whole, case(micro_batch=size).gradients()) < 1e-11
        assert [len(points.pred) for points in Spy.seen][:2] == [size, size]
        assert len(Spy.seen) == -(-COUNT * SIZE // size)


def test_the_micro_batch_changes_no_weight_in_float32() -> None:
    def weights(**train: Any) -> list[Tensor]:
        case = Case(train={**FREE, "lr": 10.0, **train})
        # Adam would blow the rounding of gradients that are nearly zero up to whole steps
        case.updater.optimizer = torch.optim.SGD(case.policy.parameters())
        case.gradients()
        return [p.detach() for p in case.policy.parameters()]

    whole, start = weights(), [p.detach() for p in Case().policy.parameters()]
    assert max(float((a - b).abs().max()) for a, b in zip(whole, start, strict=True)) > 1e-3
    for size in (SIZE, 3):
        for one, other in zip(whole, weights(micro_batch=size), strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-6)


def test_a_part_of_a_group_is_never_weighed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(train={**FREE, "micro_batch": 3})
    mistake = "dgpo.training.forward_rounds._joined"
    monkeypatch.setattr(mistake, lambda parts, batch: parts[0])
    with pytest.raises(ValueError, match="group statistics need whole groups"):
        case.gradients()


def test_snapshots_are_evaluated_once_for_parts_of_groups() -> None:
    case = Case(train={**FREE, "micro_batch": 4})
    with Calls(case.policy.model.denoisers["transformer"]) as calls:
        case.gradients()
    # four micro-batches: policy twice (without and with gradients), reference and old once
    assert calls.sizes == [4] * 16


def test_an_old_policy_that_is_the_policy_costs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWM's is, until the first optimiser step of an iteration."""

    def gradients(counted: list[int]) -> list[Tensor]:
        timesteps = {"count": 2, "indices": (0, 2)}
        case = Case(train={**FREE, "optimizer_step": "timestep"})
        algorithm = AWM.model_validate({"timesteps": timesteps})
        recipe = case.recipe.model_copy(update={"algorithm": algorithm})
        case.policy.old.update(0.0)
        case.updater = Updater(case.policy, recipe)
        with Calls(case.policy.model.denoisers["transformer"]) as calls:
            found = case.gradients()
        assert calls.sizes == counted
        return found

    rows = COUNT * SIZE
    saved = gradients([rows] * 2 + [rows] * 3)  # policy and reference; then the old policy, too
    monkeypatch.setattr(dgpo.training.forward_rounds, "old_is_policy", lambda *_: False)
    assert difference(gradients([rows] * 6), saved) < 1e-5


def test_when_the_old_policy_is_the_policy() -> None:
    late, early = (DiffusionNFT.model_validate({"old_schedule": s}) for s in ("late", "early"))
    found = [[old_is_policy(a, n) for n in (0, 1, 2, 37, 38)] for a in (AWM(), late, early, DGPO())]
    assert found == [
        [True] * 5,
        [True, True, True, True, False],
        [True, True, False, False, False],
        [False] * 5,
    ]


def half_without_spread(images: Any, prompts: list[str]) -> list[float]:
    values = brightness(images, prompts)
    return [0.5 if p == PROMPTS[0] else v for p, v in zip(prompts, values, strict=True)]


def collected(case: Case, reward: Any = half_without_spread) -> Any:
    prompts = [Prompt(text) for text in PROMPTS[:COUNT]]
    rewards = load_rewards([reward])
    return Collector(case.recipe, case.policy, rewards, lambda _: prompts)(0)


def test_groups_without_spread_are_left_out_and_counted() -> None:
    case = Case(train=FREE, algorithm={"equal_groups": "skip"})
    found = collected(case)
    assert found.figures["groups_dropped"] == 1.0
    assert found.batch.positions.tolist() == list(range(SIZE, 2 * SIZE))
    assert found.batch.share == 0.5
    with Calls(case.policy.model.denoisers["transformer"]) as calls:
        case.gradients(found.batch)
    assert calls.sizes == [SIZE] * 3  # policy, reference, old: of the group that is left


def test_leaving_groups_out_does_not_change_the_policy_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The KL term is another matter, which equal_groups decides."""
    case = Case(torch.float64, algorithm={"kl": 0.0}, lora=None, train=FREE)
    left_out = case.gradients(collected(case).batch)
    case = Case(torch.float64, algorithm={"kl": 0.0}, lora=None, train=FREE)
    monkeypatch.setattr(Groups, "spread", lambda self, x: torch.ones(self.count, dtype=torch.bool))
    kept = collected(case).batch
    assert len(kept.x0) == COUNT * SIZE
    assert float(kept.advantages[:SIZE].abs().max()) < 1e-6
    assert difference(left_out, case.gradients(kept)) < 1e-11


def test_groups_without_spread_are_trained_for_their_kl_term() -> None:
    """As in the published runs: they add the gradient of their KL term, and no other."""
    everything = Case(torch.float64, lora=None, train=FREE)
    found = collected(everything)
    assert found.figures["groups_dropped"] == 1.0 and found.batch.share == 1.0
    assert found.advantages[:SIZE].tolist() == [0.0] * SIZE
    gradient = everything.gradients(found.batch)
    points = Spy.seen[-1]
    assert float(points.advantages[:SIZE].abs().max()) == 0
    skipped = Case(torch.float64, lora=None, train=FREE, algorithm={"equal_groups": "skip"})
    left_out = skipped.gradients(collected(skipped).batch)
    equal = Case(torch.float64, lora=None, train=FREE)
    alike = collected(equal, lambda images, prompts: [0.25] * len(images)).batch
    half = replace(alike, **rows_of(alike, slice(0, SIZE)), total=COUNT * SIZE)
    kl_alone = equal.gradients(half)
    both = [a + b for a, b in zip(left_out, kl_alone, strict=True)]
    assert difference(gradient, both) < 1e-11 < difference(gradient, left_out)


def rows_of(batch: Batch, rows: slice) -> dict[str, Any]:
    groups = Groups.contiguous(1, SIZE)
    own = {name: getattr(batch, name)[rows] for name in ("x0", "advantages", "positions")}
    return {**own, "groups": groups}


def test_without_any_spread_a_step_is_taken_for_the_kl_term_if_at_all() -> None:
    def found(**algorithm: Any) -> Any:
        case = Case(algorithm=algorithm)
        return collected(case, lambda images, prompts: [0.25] * len(images))

    assert found(equal_groups="skip").batch is found(kl=0.0).batch is None
    assert found().figures["groups_dropped"] == COUNT
    case = Case(train=FREE, algorithm={"kl": 1.0})
    batch = collected(case, lambda images, prompts: [0.25] * len(images)).batch
    figures = case.updater.update(batch, 0)
    assert case.updater.step == 1 and figures["loss"] == pytest.approx(figures["kl"]) != 0


def check_noise(case: Case) -> None:
    """Trap 4: one noise a group, fresh for every group, level and iteration."""
    for iteration in (0, 1):
        case.updater.update(case.batch, iteration)
    drawn = [points.noise.reshape(COUNT, SIZE, -1) for points in Spy.seen]
    assert len(drawn) == 4
    for noise in drawn:
        assert torch.equal(noise, noise[:, :1].expand_as(noise))
    different = torch.cat([noise[:, 0] for noise in drawn])
    assert len(different.unique(dim=0)) == 4 * COUNT


TWO_LEVELS = {"timesteps": {"count": 2, "indices": (0, 2)}}


def test_noise_is_fresh_for_every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    check_noise(Case(algorithm=TWO_LEVELS))
    right = dgpo.training.forward_rounds.stream

    def stale(seed: int, what: str, iteration: int, *place: int) -> torch.Generator:
        return right(seed, what, iteration, *(place[1:] if what == "noise" else place))

    monkeypatch.setattr(dgpo.training.forward_rounds, "stream", stale)
    with pytest.raises(AssertionError):
        check_noise(Case(algorithm=TWO_LEVELS))


def test_noise_of_its_own_for_every_sample_if_asked_for() -> None:
    case = Case(algorithm={"shared_noise": False})
    case.updater.update(case.batch, 0)
    assert len(Spy.seen[0].noise.flatten(1).unique(dim=0)) == COUNT * SIZE


def few_calls() -> Case:
    return Case(algorithm={"kl": 0.0, "clip": None})


def check_first_level(case: Case) -> None:
    """Trap 5: pure noise is a level like any other."""
    with_it = 0
    for iteration in range(6):
        Spy.seen.clear()
        case.updater.update(case.batch, iteration)
        with_it += any(points.level is case.batch.levels[0] for points in Spy.seen)
    assert 0 < with_it < 6


def test_the_first_level_is_not_trained_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    check_first_level(few_calls())
    monkeypatch.setattr(TimestepChoice, "choose", lambda self, levels, generator: [0])
    with pytest.raises(AssertionError):
        check_first_level(few_calls())


def check_timestep(case: Case) -> None:
    """Trap 12: what the denoiser is told is the noise level that the samples really have."""
    with Calls(case.policy.model.denoisers["transformer"]) as calls:
        case.updater.update(case.batch, 0)
    told = iter(calls.timesteps)
    for points in Spy.seen:
        towards = (points.noise - points.x0).flatten()
        sigma = float((points.xt - points.x0).flatten() @ towards / (towards @ towards))
        for _ in range(3):  # policy, reference, old
            assert next(told) == pytest.approx(1000 * sigma, abs=0.01)


def test_the_denoiser_is_told_the_level_that_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    check_timestep(Case(algorithm=TWO_LEVELS))
    right = FlowMatching.corrupt

    def other(self: FlowMatching, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        return right(self, x0, noise, Level(level.timestep, 0.9 * level.sigma))

    monkeypatch.setattr(FlowMatching, "corrupt", other)
    with pytest.raises(AssertionError):
        check_timestep(Case(algorithm=TWO_LEVELS))


def check_averages(case: Case) -> None:
    """Trap 10: after n optimiser steps both averages are where n updates by hand take them."""
    old = [t.clone() for t in case.policy.old.tensors]
    slow = [t.clone() for t in case.policy.slow.tensors]
    steps = 2 if case.recipe.train.optimizer_step == "timestep" else 1
    weights: list[list[Tensor]] = []

    def keep(*_: Any) -> None:
        weights.append([p.detach().clone() for p in case.policy.parameters()])

    case.updater.optimizer.register_step_post_hook(keep)
    for iteration in range(2):
        case.updater.update(case.batch, iteration)
    assert case.updater.step == len(weights) == 2 * steps
    for step, now in enumerate(weights):
        decay = min(0.3, 0.1 * step)
        old = [decay * a + (1 - decay) * b for a, b in zip(old, now, strict=True)]
        if (step + 1) % 2 == 0:
            slow = [0.5 * a + 0.5 * b for a, b in zip(slow, now, strict=True)]
    for mine, theirs in zip(
        (*old, *slow), (*case.policy.old.tensors, *case.policy.slow.tensors), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-7)


@pytest.mark.parametrize("every", ["iteration", "timestep"])
def test_averages_move_once_for_an_optimiser_step(
    every: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def case() -> Case:
        return Case(
            algorithm={**TWO_LEVELS, "old_decay_rate": 0.1},
            train={"optimizer_step": every},
            ema={"decay": 0.5, "every": 2, "warmup": None},
        )

    check_averages(case())
    if every == "timestep":
        return
    right = Updater._optimize

    def twice(self: Updater, *given: Any) -> str | None:
        norm = right(self, *given)
        self.policy.old.update(self.recipe.algorithm.old_decay(self.step))
        return norm

    monkeypatch.setattr(Updater, "_optimize", twice)
    with pytest.raises(AssertionError):
        check_averages(case())


def test_inner_epochs_train_the_same_pictures_with_noise_of_their_own() -> None:
    def steps(epochs: int, every: str) -> tuple[list[list[Tensor]], list[Forward]]:
        case = Case(algorithm=TWO_LEVELS, train={"inner_epochs": epochs, "optimizer_step": every})
        found: list[list[Tensor]] = []

        def keep(*_: Any) -> None:
            found.append([p.detach().clone() for p in case.policy.parameters()])

        case.updater.optimizer.register_step_post_hook(keep)
        case.updater.update(case.batch, iteration=0)
        assert len(found) == case.recipe.updates_per_iteration
        return found, list(Spy.seen)

    for every, count in (("iteration", 1), ("timestep", 2)):
        once, _ = steps(1, every)
        thrice, seen = steps(3, every)
        assert (len(once), len(thrice)) == (count, 3 * count)
        for one, same in zip(once, thrice[:count], strict=True):
            assert all(map(torch.equal, one, same))  # the first epoch is that of a run with one
        assert len(seen) == 3 * 2  # epochs, levels
        assert all(torch.equal(points.x0, seen[0].x0) for points in seen)
        noises = {tuple(points.noise[0].flatten().tolist()) for points in seen}
        assert len(noises) == len(seen)
        levels = [points.level.sigma for points in seen]
        epochs = [tuple(levels[start : start + 2]) for start in (0, 2, 4)]
        assert len(set(epochs)) > 1 and all(len(set(epoch)) == 2 for epoch in epochs)


def test_an_old_policy_that_is_the_policy_is_asked_from_the_second_inner_epoch_on() -> None:
    case = Case(train={**FREE, "inner_epochs": 2})
    recipe = case.recipe.model_copy(update={"algorithm": AWM.model_validate(TWO_LEVELS)})
    case.updater = Updater(case.policy, recipe)
    with Calls(case.policy.model.denoisers["transformer"]) as calls:
        case.updater.update(case.batch, iteration=0)
    rows = COUNT * SIZE
    assert calls.sizes == [rows] * (2 * 2) + [rows] * (2 * 3)  # policy and reference; and old


def test_a_warm_average_forgets_the_base_model_sooner() -> None:
    ema = {"decay": 0.25, "every": 2, "warmup": True}
    case = Case(train={"iterations": 20}, ema=ema)
    slow = [t.clone() for t in case.policy.slow.tensors]
    for iteration in range(8):
        case.updater.update(case.batch, iteration)
        if iteration % 2:
            decay = (2 / 11, 3 / 12, 0.25, 0.25)[iteration // 2]
            now = case.policy.parameters()
            slow = [decay * a + (1 - decay) * b.detach() for a, b in zip(slow, now, strict=True)]
            for mine, theirs in zip(slow, case.policy.slow.tensors, strict=True):
                assert torch.allclose(mine, theirs, atol=1e-7)


def test_the_decay_of_the_average_is_limited_by_updates_or_by_steps() -> None:
    def decays(steps: tuple[int, ...], **ema: Any) -> list[float]:
        return [EmaSettings.model_validate(ema).decay_of(step) for step in steps]

    assert decays((8, 640, 648)) == pytest.approx([2 / 11, 0.9, 0.9])
    assert decays((8, 72, 88), warmup="steps") == pytest.approx([8 / 17, 72 / 81, 0.9])
    assert decays((88, 96), warmup="steps", decay=0.5) == [0.5, 0.5]
    assert decays((8,), warmup=None) == [0.9]
    twice = {"warmup": "steps", "moves": 2}
    assert decays((8, 800), **twice) == pytest.approx([(8 / 17) ** 2, 0.81])
    old = [EmaSettings.model_validate({"warmup": value}).warmup for value in (True, False)]
    assert old == ["updates", None]


def test_what_is_left_of_the_base_model() -> None:
    def share(steps: int, **ema: Any) -> float:
        return EmaSettings.model_validate(ema).base_share(steps)

    assert share(40, warmup=None) == pytest.approx(0.9**5)
    assert share(40, warmup="steps", moves=2) == pytest.approx(0.02, abs=0.001)
    assert share(7) == 1 and share(8) == share(15) == pytest.approx(2 / 11)
    assert share(10**9) < 1e-6


def test_an_iteration_without_a_batch_moves_the_old_policy_too() -> None:
    case = Case()
    recipe = case.recipe.model_copy(update={"algorithm": DiffusionNFT()})
    updater = Updater(case.policy, recipe)
    before = [t.clone() for t in case.policy.old.tensors]
    updater.end_iteration(300)
    for old, was, now in zip(
        case.policy.old.tensors, before, case.policy.parameters(), strict=True
    ):
        assert torch.allclose(old, 0.3 * was + 0.7 * now.detach(), atol=1e-6)
    assert updater.step == 0


def test_the_learning_rate_follows_its_schedule() -> None:
    def rates(steps: int = 4, algorithm: Any = None, **train: Any) -> list[float]:
        case = Case(train={"iterations": 4, **train}, algorithm=algorithm or {})
        return [case.updater._factor(step) for step in range(steps)]

    assert rates() == [1, 1, 1, 1]
    assert rates(warmup=2) == [0.5, 1, 1, 1]
    assert rates(lr_schedule="linear") == [1, 0.75, 0.5, 0.25]
    assert rates(lr_schedule="cosine") == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    each_level = rates(lr_schedule="linear", optimizer_step="timestep")
    assert each_level == [1, 0.75, 0.5, 0.25]  # one level an iteration
    # four steps an iteration: the rate comes down over all sixteen
    several = {"optimizer_step": "timestep", "inner_epochs": 2}
    slower = rates(16, TWO_LEVELS, lr_schedule="linear", **several)
    assert slower == [1 - step / 16 for step in range(16)]


def test_numbers_that_are_not_finite_change_no_weight() -> None:
    case = Case(guards={"nonfinite": 2})
    before = [p.detach().clone() for p in case.policy.parameters()]
    broken = Batch(**{**vars(case.batch), "x0": case.batch.x0 * float("inf")})
    figures = case.updater.update(broken, 0)
    assert math.isnan(figures["loss"]) and figures["nonfinite_steps"] == 1
    with pytest.raises(NonFinite, match=r"iteration 2: the loss is nan.*2 times in a row"):
        case.updater.update(broken, 1)
    case.policy.parameters()[0].register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFinite, match="iteration 4: the gradient norm is nan"):
        case.updater.update(case.batch, 3)
    for mine, theirs in zip(before, case.policy.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert case.updater.step == 0


def _flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.double().flatten() for gradient in gradients])


def test_small_gradients_survive_float16() -> None:
    """Losses of large pictures and batches are small: here of small advantages."""

    def gradient(dtype: torch.dtype, scale: float | None = None) -> Tensor:
        precision = str(dtype).removeprefix("torch.")
        case = Case(dtype, precision=precision, train=FREE, guards={"nonfinite": 1})
        if scale is not None:
            case.updater.gradient_scale = scale
        small = {**vars(case.batch), "advantages": case.batch.advantages * 1e-5}
        return _flat(case.gradients(Batch(**small)))

    wanted = gradient(torch.float32)
    likeness = torch.nn.functional.cosine_similarity
    assert likeness(gradient(torch.float16), wanted, dim=0) > 0.99
    assert float(gradient(torch.float16).norm()) == pytest.approx(float(wanted.norm()), rel=0.02)
    assert likeness(gradient(torch.float16, 1.0), wanted, dim=0) < 0.9  # why it is scaled


def test_an_overflow_in_float16_halves_the_scale() -> None:
    case = Case(torch.float16, precision="float16", train=FREE, guards={"nonfinite": 1})
    case.updater.gradient_scale = 2.0**60
    figures = case.updater.update(case.batch, 0)
    assert figures["nonfinite_steps"] == 1 and case.updater.step == 0
    assert case.updater.gradient_scale == 2.0**59 and case.updater.nonfinite == 0
    while case.updater.step == 0:
        case.updater.update(case.batch, 0)
    assert 1 < case.updater.gradient_scale < 2.0**50
    case.updater.scaled = SCALE_GROWS - 1
    before = case.updater.gradient_scale
    case.updater.update(case.batch, 0)
    assert case.updater.gradient_scale == 2 * before and case.updater.scaled == 0
