"""Policy gradients in the same loop: rollouts, recorded steps, updates, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from algorithms.table import kinds, predicts_noise
from dgpo.algorithms import FlowGRPO
from dgpo.core import CPS, Trajectory
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.models.samplers.sde_schedulers import make_sde_scheduler
from dgpo.prompts import Prompt
from dgpo.recipe import Recipe
from dgpo.rewards import load_rewards
from dgpo.rewards.shipped.stand_in import brightness
from dgpo.trainer import Trainer
from dgpo.training.collector import Collected, Collector
from dgpo.training.trajectory_rounds import RATIO_TOLERANCE
from dgpo.training.updater import Updater
from families.tiny import sd3_small, sd15
from reliable import assert_same
from tiny_runs import PROMPTS, Calls, light, rows, settings

SIZE, COUNT = 4, 4


class Spy(FlowGRPO):
    """Flow-GRPO that shows what its loss was given."""

    seen: ClassVar[list[Trajectory]] = []

    def loss(self, points: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(points)
        return super().loss(points)


def without_first_prompt(images: Any, prompts: list[str]) -> list[float]:
    """No spread in the first group."""
    values = brightness(images, prompts)
    return [0.5 if p == PROMPTS[0] else v for p, v in zip(prompts, values, strict=True)]


class Case:
    """A policy that has moved from its reference, and rollouts of four groups of four."""

    def __init__(self, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
        algorithm = Spy(**changes.pop("algorithm", {}))
        data = settings(group_size=SIZE, groups_per_iteration=COUNT, **changes)
        self.recipe = Recipe.from_dict({**data, "algorithm": algorithm})
        pipe = sd3_small().to(dtype)
        self.model = PipelineModel(pipe, call=self.recipe.rollout.call)
        self.policy = Policy(self.model, self.recipe.lora, seed=0)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.05 * noise.to(parameter)
        self.scheduler = make_sde_scheduler(algorithm.sde, pipe.scheduler)
        self.updater = Updater(self.policy, self.recipe)
        Spy.seen.clear()

    def collect(self, reward: Any = brightness, iteration: int = 0) -> Collected:
        prompts = [Prompt(text) for text in PROMPTS]
        rewards = load_rewards(reward if isinstance(reward, dict) else [reward])
        return Collector(self.recipe, self.policy, rewards, lambda _: prompts)(iteration)

    def gradients(self, reward: Any = brightness) -> list[list[Tensor]]:
        """Those of each optimiser step; no step changes a weight."""
        found: list[list[Tensor]] = []
        self.updater.optimizer = torch.optim.SGD(self.policy.parameters())

        def keep(*_: Any) -> None:
            found.append([p.grad.clone() for p in self.policy.parameters() if p.grad is not None])
            for group in self.updater.optimizer.param_groups:
                group["lr"] = 0.0

        self.updater.optimizer.register_step_pre_hook(keep)
        batch = self.collect(reward).batch
        assert batch is not None
        self.updater.update(batch, 0)
        return found


FREE: dict[str, Any] = {"max_grad_norm": 1e9}


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    assert len(a) == len(b) > 0
    largest = max(float(x.abs().max()) for x in a)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / largest


def test_micro_batches_change_nothing() -> None:
    """In float64; the recorded rollout is that of the first case's batches."""

    def steps(**train: Any) -> list[list[Tensor]]:
        case = Case(torch.float64, lora=None, train={**FREE, **train}, algorithm={"clip": 0.5})
        return case.gradients()

    whole = steps()
    assert len(whole) == 2
    for size in (SIZE, 3):
        for one, other in zip(whole, steps(micro_batch=size), strict=True):
            assert difference(one, other) < 1e-10


def test_each_update_takes_its_own_part_of_the_groups() -> None:
    case = Case(train=FREE, algorithm={"updates": 2})
    case.gradients()
    for points in Spy.seen:
        assert len(points.pred) == 2 * SIZE
    # two steps with noise of three, for either part
    assert [float(p.level.sigma) for p in Spy.seen] == [p.level.sigma for p in Spy.seen[:2]] * 2
    assert not torch.equal(Spy.seen[0].xt, Spy.seen[2].xt)


def test_two_updates_average_to_one() -> None:
    """The gradient of all groups is the mean of the parts' gradients where no weight moves."""

    def steps(updates: int, reward: Any) -> list[list[Tensor]]:
        case = Case(torch.float64, lora=None, train=FREE, algorithm={"updates": updates, "kl": 0.0})
        return case.gradients(reward)

    for reward in (brightness, without_first_prompt):  # groups that are left out count as zero
        (one,), two = steps(1, reward), steps(2, reward)
        mean = [(a + b) / 2 for a, b in zip(*two, strict=True)]
        assert difference(one, mean) < 1e-10


@pytest.mark.filterwarnings("ignore:a group is left out")
def test_a_part_that_has_lost_groups_is_the_mean_of_the_rest() -> None:
    def breaks(images: Any, prompts: list[str]) -> list[float]:
        if PROMPTS[0] in prompts:
            raise ValueError("no answer")
        return brightness(images, prompts)

    def steps(updates: int) -> list[list[Tensor]]:
        algorithm = {"updates": updates, "kl": 0.0}
        rollout = {"batch": SIZE}  # one call of the reward for each group
        case = Case(torch.float64, lora=None, train=FREE, algorithm=algorithm, rollout=rollout)
        return case.gradients({breaks: {"on_error": "skip_group"}})

    (one,), (first, second) = steps(1), steps(2)
    mean = [(a + 2 * b) / 3 for a, b in zip(first, second, strict=True)]  # one group and two
    assert difference(one, mean) < 1e-10


def test_a_part_without_groups_takes_no_step() -> None:
    def half(images: Any, prompts: list[str]) -> list[float]:
        values = brightness(images, prompts)
        return [0.5 if p in PROMPTS[:2] else v for p, v in zip(prompts, values, strict=True)]

    case = Case(train=FREE)
    assert len(case.gradients(half)) == 1


def test_recorded_steps_are_those_of_the_groups_that_are_left() -> None:
    case = Case(algorithm={"window": {"size": 1, "first": 1}})
    everything, left = case.collect().batch, case.collect(without_first_prompt).batch
    assert everything is not None and left is not None
    assert [step.index for step in left.steps] == [1]
    assert left.positions.tolist() == list(range(SIZE, COUNT * SIZE))
    for name in ("sample", "output", "previous"):
        ours, all_rows = getattr(left.steps[0], name), getattr(everything.steps[0], name)
        assert torch.equal(ours, all_rows[SIZE:])


def test_pictures_do_not_depend_on_the_batch_of_the_rollout() -> None:
    whole, parts = Case().collect().batch, Case(rollout={"batch": 5}).collect().batch
    assert whole is not None and parts is not None
    torch.testing.assert_close(parts.x0, whole.x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.steps[1].previous, whole.steps[1].previous)


def test_iterations_have_noise_of_their_own() -> None:
    first, second = Case().collect().batch, Case().collect(iteration=1).batch
    assert first is not None and second is not None
    assert not torch.allclose(first.x0, second.x0, atol=1e-2)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_predictions_are_made_with_the_guidance_of_the_rollout(guidance: float) -> None:
    case = Case(rollout={"guidance_scale": guidance}, algorithm={"updates": 1, "kl": 0.0})
    batch = case.collect().batch
    assert batch is not None
    with Calls(case.model.denoisers["transformer"]) as calls:
        case.updater.update(batch, 0)
    assert calls.sizes == [COUNT * SIZE * (1 if guidance == 1 else 2)] * 2
    for points in Spy.seen:
        torch.testing.assert_close(points.pred, points.old, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 12}])
def test_the_ratio_is_one_bit_by_bit_for_equal_batches(lora: Any) -> None:
    """Weights merged for the rollout, and blended in the graph for the update, are the same."""
    case = Case(algorithm={"updates": 1}, lora=lora)
    batch = case.collect().batch
    assert batch is not None
    assert case.updater.update(batch, 0)["ratio"] == 1
    for points in Spy.seen:
        assert torch.equal(points.pred, points.old)


@pytest.mark.parametrize("sde", [{}, {"kind": "cps"}])
def test_another_model_in_training_is_refused(sde: dict[str, Any]) -> None:
    case = Case(algorithm={"sde": sde})
    batch = case.collect().batch
    assert batch is not None
    before = [p.detach().clone() for p in case.policy.parameters()]
    denoiser = case.model.denoisers["transformer"]
    hook = denoiser.register_forward_hook(lambda m, i, out: (1.01 * out[0], *out[1:]))
    with pytest.raises(UserError, match=r"iteration 1: before the first update the ratio must be"):
        case.updater.update(batch, 0)
    hook.remove()
    for mine, theirs in zip(before, case.policy.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_tolerance_is_narrower_than_the_clip_and_wider_than_rounding() -> None:
    assert FlowGRPO().clip >= 10 * RATIO_TOLERANCE
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(dtype, train={"micro_batch": 3}, rollout={"batch": 5}, algorithm={"updates": 1})
        batch = case.collect().batch
        assert batch is not None
        case.updater.update(batch, 0)
        now, old = (
            torch.cat([p.log_prob(p.moments(getattr(p, name))) for p in Spy.seen]).detach()
            for name in ("pred", "old")
        )
        off = float(((now - old).exp() - 1).abs().max())
        assert off < (1e-6 if dtype == torch.float32 else 5e-4)


RUNS: dict[str, dict[str, Any]] = {
    **{name: {} for name in kinds("trajectory")},
    "flow_grpo-fast": {"window": {"size": 1}},
    "flow_dppo": {"sde": {"kind": "dance"}},
}


def run(folder: Path, name: str, resume: bool = False, **changes: Any) -> Trainer:
    own = {"name": name.removesuffix("-fast"), **RUNS[name]}
    noise = predicts_noise(own["name"])
    lora = {"targets": ["to_q", "to_k"]} if noise else {}
    recipe = {**settings(lora=lora, **changes), "algorithm": own, "run": {"dir": str(folder)}}
    return Trainer(
        model=sd15() if noise else sd3_small(),
        train_dataset=PROMPTS,
        reward_funcs=brightness,
        recipe=recipe,
        resume=resume,
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_short_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)
    trainer = run(tmp_path / "run", name, eval={"at_start": True, "every": 2})
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    trainer.train()
    assert trainer.updater.step == 4  # two iterations of two updates
    logged = rows(tmp_path / "run")
    assert [row["iteration"] for row in logged] == [1, 2]
    for row in logged:
        assert {"reward_mean", "loss", "ratio", "clipped", "grad_norm"} <= set(row)
        assert ("kl" in row) == ("ref" in trainer.recipe.algorithm.snapshots)
        assert ("divergence" in row) == (name == "flow_dppo")
        assert all(math.isfinite(value) for value in row.values())
        assert row["ratio"] == pytest.approx(1, abs=0.05) and row["grad_norm"] > 0
    pairs = zip(before, trainer.policy.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert type(trainer.scheduler) is type(trainer.model.pipe.scheduler)  # evaluations are plain


def test_a_resumed_run_is_the_run_that_was_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    light(monkeypatch)
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    train = {"iterations": 3, "lr": 1e-3}
    run(through, "flow_grpo-fast", train=train).train()
    run(stopped, "flow_grpo-fast", train={**train, "iterations": 1}).train()
    run(stopped, "flow_grpo-fast", resume=True, train=train).train()
    assert_same(through, stopped)


def recipe(**changes: Any) -> Recipe:
    algorithm = changes.pop("algorithm", {"name": "flow_grpo"})
    return Recipe.from_dict({**settings(**changes), "algorithm": algorithm})


def test_a_recipe_of_a_policy_gradient() -> None:
    made = recipe(algorithm={"name": "flow_grpo", "sde": {"kind": "cps", "noise_level": 0.9}})
    assert isinstance(made.algorithm, FlowGRPO) and made.algorithm.sde == CPS(noise_level=0.9)
    assert made.updates_per_iteration == 2
    assert Recipe.from_dict(made.to_dict()) == made
    assert made.to_dict()["algorithm"]["name"] == "flow_grpo"
    assert recipe(rollout={"scheduler": "euler"}).rollout.scheduler == "euler"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout": {"scheduler": "unipc"}}, "rollout.scheduler = 'unipc'.*null, or euler"),
        (
            {"algorithm": "ddpo", "rollout": {"scheduler": "euler"}},
            "rollout.scheduler = 'euler'.*null, or ddim",
        ),
        ({"rollout": {"switch_to_old_after": 3}}, "rollout.switch_to_old_after = 3.*null"),
        ({"train": {"optimizer_step": "timestep"}}, "train.optimizer_step = 'timestep'.*iteration"),
        ({"train": {"inner_epochs": 2}}, "train.inner_epochs = 2.*algorithm.updates"),
        ({"groups_per_iteration": 3}, "algorithm.updates = 2: groups_per_iteration = 3"),
        ({"rollout": {"steps": 1}}, "rollout.steps = 1.*2 or more"),
        (
            {"algorithm": {"name": "flow_grpo", "window": {"size": 3}}},
            "algorithm.window.size = 3: rollout.steps = 3 leaves 2",
        ),
        ({"train": {"warmup": 4}}, "only 4 optimiser steps"),
        (
            {"algorithm": {"name": "flow_grpo", "sde": {"noise_level": -1}}},
            "algorithm.sde.noise_level = -1",
        ),
        (
            {"algorithm": {"name": "flow_grpo", "sde": {"nois_level": 1}}},
            r"unknown key algorithm.sde.nois_level \(did you mean algorithm.sde.noise_level",
        ),
        (
            {"algorithm": {"name": "flow_grpo", "sde": {"kind": "ode"}}},
            "algorithm.sde.*kind should be flow, dance, cps or ddim",
        ),
        (
            {"algorithm": {"name": "ddpo", "sde": {"kind": "flow"}}},
            "algorithm.sde.kind = 'flow': ddpo takes ddim",
        ),
        ({"algorithm": {"name": "flow_grpo", "timesteps": {}}}, "unknown key algorithm.timesteps"),
        ({"algorithm": "flow_gpro"}, "'flow_grpo'"),
    ],
)
def test_what_a_policy_gradient_cannot_have(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        recipe(**changes)
