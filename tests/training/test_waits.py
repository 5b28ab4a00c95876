"""What an optimiser step and a rollout step cost beside arithmetic: passes, and waits for a GPU."""

from __future__ import annotations

import functools
import math
import signal
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from algorithms.table import predicts_noise
from dgpo import registry
from dgpo.algorithms import TrajectoryAlgorithm
from dgpo.core import Epsilon, FlowMatching, FlowSDE, Level
from dgpo.core.sde import DDIM
from dgpo.core.transfer import read
from dgpo.distributed.assignment import Assignment
from dgpo.distributed.processes import SINGLE, Processes
from dgpo.interrupts import Terminated
from dgpo.models.pipeline.probes import Recording, Step
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.models.samplers.sde_schedulers import make_sde_scheduler, with_noise
from dgpo.models.weights.snapshots import Snapshot
from dgpo.recipe import Recipe
from dgpo.rewards import Scored
from dgpo.training.batch import Batch, build_batch
from dgpo.training.updater import NonFinite, Updater
from tiny_runs import TIMESTEPS, settings
from waiting import META, Device, Held, device

SIZE, COUNT = 4, 2
SHAPE = (2, 3, 3)


class Toy:
    """A policy whose denoiser scales the channels; it counts its passes by weights and guidance."""

    def __init__(self, on: Device, noise: bool) -> None:
        self.weight = torch.nn.Parameter(on.hold(torch.tensor([0.9, 1.1])[:, None, None]))
        self.reference = on.hold(torch.ones(2, 1, 1))
        denoiser = torch.nn.Module()
        denoiser.weight = self.weight
        process = Epsilon(torch.linspace(0.99, 0.01, 1000)) if noise else FlowMatching()
        model = {"denoisers": {"toy": denoiser}, "process": process, "device": META}
        self.model = SimpleNamespace(**model)
        self.old, self.slow = Snapshot(self.parameters()), Snapshot(self.parameters())
        self.sharded = False
        self.passes: Counter[tuple[str, float]] = Counter()

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.weight]

    def predict(
        self,
        xt: Tensor,
        level: Level,
        cond: Conditioning,
        weights: str = "policy",
        guidance_scale: float = 1.0,
    ) -> Tensor:
        assert len(xt) == cond.size == len(cond.kwargs["prompt_embeds"])
        self.passes[weights, guidance_scale] += 1
        if weights == "policy":
            return self.weight * xt
        return (self.reference if weights == "ref" else self.old.tensors[0]) * xt


class Case:
    """An update of a registered algorithm on the device, of two groups of four."""

    def __init__(self, on: Device, name: str, size: int = SIZE, **changes: Any) -> None:
        kind = registry.resolve("algorithm", name)
        own = {"timesteps": TIMESTEPS} if kind.points == "forward" else {}
        own |= changes.pop("algorithm", {})
        self.recipe = Recipe.from_dict(
            {
                **settings(group_size=size, groups_per_iteration=COUNT, **changes),
                "algorithm": kind(**own),
            }
        )
        self.policy = Toy(on, noise := predicts_noise(name))
        self.updater = Updater(cast(Any, self.policy), self.recipe)
        rows, generator = size * COUNT, torch.Generator().manual_seed(0)
        sigmas = [0.9, 0.6, 0.3] if noise else [0.95, 0.6, 0.3]
        levels = [Level(on.hold(torch.tensor(1000 * s)), s) for s in sigmas]
        rewards = torch.randn(rows, generator=generator)
        cond = Conditioning({"prompt_embeds": on.hold(torch.zeros(COUNT, 5))}, COUNT)
        made = Rollout(on.hold(torch.randn(rows, *SHAPE, generator=generator)), None, levels)
        algorithm = self.recipe.algorithm
        if isinstance(algorithm, TrajectoryAlgorithm):
            noisy = algorithm.noisy_steps(3, 0, 0)
            for index, (level, then) in enumerate(pairwise(levels)):
                output = (self.policy.weight * made.x0).detach()
                moments = algorithm.sde.moments(
                    self.policy.model.process, made.x0, output, level, then
                )
                drawn = on.hold(torch.randn(rows, *SHAPE, generator=generator))
                after = moments.mean + moments.std * drawn
                assert index in noisy
                made.steps.append(Step(index, level, made.x0, output, after))
        scored = Scored({"r": rewards}, torch.ones(rows, 1, dtype=torch.float64))
        parts = getattr(algorithm, "updates", 1)
        assignment = Assignment.of(COUNT, size, parts, SINGLE)
        self.batch = cast(Batch, build_batch(self.recipe, scored, made, cond, assignment).batch)

    def update(self, iteration: int = 0) -> dict[str, float]:
        self.policy.passes.clear()
        return self.updater.update(self.batch, iteration)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device; the fused kernels of the optimiser, which never wait, are not for it."""
    plain = functools.partial(torch.optim.AdamW, foreach=False)
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, fused, **given: plain(p, **given))
    with device() as made:
        yield made


def test_what_a_wait_is(on: Device) -> None:
    held, rows = on.hold(torch.arange(6.0).reshape(3, 2)), torch.tensor([0, 2])
    assert float(held.sum()) == 15 and held.sum().tolist() == 15
    assert held[rows].shape == (2, 2) and len(held.nonzero()) == 5
    assert on.waits == {"read": 1, "copy": 1, "send": 1, "count": 1}
    on.waits.clear()
    assert read([held[0, 1], 2.5, held.sum()], held) == [1.0, 2.5, 15.0]
    assert on.waits == {"copy": 1}


@pytest.mark.parametrize("name", registry.ALGORITHMS)
def test_an_optimiser_step_waits_once_whatever_its_micro_batches(name: str, on: Device) -> None:
    figures = []
    for micro_batch in (8, 4, 1):
        case = Case(on, name, train={"micro_batch": micro_batch})
        on.waits.clear()
        figures.append(case.update())
        steps = case.updater.step
        assert steps == case.recipe.updates_per_iteration
        # the losses, figures and the norm together; and once an iteration the ratio of a rollout
        trajectory = isinstance(case.recipe.algorithm, TrajectoryAlgorithm)
        each = {kind: count / steps for kind, count in sorted(on.waits.items())}
        waited = ", ".join(f"{count:g} {kind}" for kind, count in each.items())
        print(
            f"{name}, {8 // micro_batch} micro-batches: {waited}"
        )  # docs/performance.md quotes it
        assert on.waits == Counter(copy=steps, read=int(trajectory))
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], rel=1e-4, abs=1e-6)


def test_a_loss_that_is_not_finite_is_seen_before_the_step(on: Device) -> None:
    case = Case(on, "dgpo", train={"micro_batch": 1}, guards={"nonfinite": 2})
    case.batch = Batch(**{**vars(case.batch), "x0": case.batch.x0 * math.inf})
    before = cast(Held, case.policy.weight).numbers.clone()
    assert case.update()["nonfinite_steps"] == 1
    with pytest.raises(NonFinite, match="iteration 2: the loss is nan"):
        case.update(1)
    assert torch.equal(cast(Held, case.policy.weight).numbers, before)


class Two(Processes):
    """Two processes, of which the other always agrees."""

    def __init__(self) -> None:
        super().__init__(size=2)
        self.meetings = 0

    def all_gather_object(self, value: Any, what: str) -> list[Any]:
        return [value]

    def sum_gradients(self, parameters: Any) -> None: ...

    def stop_if_asked(self, what: str) -> None:
        self.meetings += 1
        if self.heard:
            raise Terminated


def test_processes_with_groups_of_their_own_meet_once_a_step(on: Device) -> None:
    """One that is asked to stop makes no other pass, and all stop before the step."""
    case = Case(on, "dgpo", train={"micro_batch": 1, "optimizer_step": "timestep"})
    case.updater.processes = two = Two()
    case.update()
    assert two.meetings == case.updater.step == 2

    def hear() -> None:
        two.heard = signal.SIGTERM if case.policy.passes[POLICY] == 8 + 3 else 0

    case.policy.passes.clear()
    with pytest.raises(Terminated):
        case.updater.update(case.batch, 1, hear)
    assert two.meetings == 3 and case.updater.step == 2 and case.updater.at_rest
    assert case.policy.passes[POLICY] == 8 + 3  # all parts of both groups are weighed before


POLICY, REF, OLD = ("policy", 1.0), ("ref", 1.0), ("old", 1.0)
GUIDED = ("ref", 4.5)
PASSES: dict[str, tuple[str, dict[str, Any], list[tuple[str, float]]]] = {
    "frozen": ("dgpo", {}, [POLICY, REF, OLD]),
    "frozen, guided": ("dgpo", {"kl_cfg": 4.5}, [POLICY, GUIDED, OLD]),
    "frozen, plain": ("dgpo", {"kl_cfg": 4.5, "baseline": "plain"}, [POLICY, REF, GUIDED, OLD]),
    "without a trust region": ("dgpo", {"clip": None}, [POLICY, REF]),
    "EMA": ("dgpo", {"reference": "ema"}, [POLICY, REF, OLD]),
    "EMA, guided": ("dgpo", {"reference": "ema", "kl_cfg": 4.5}, [POLICY, GUIDED, OLD]),
    "EMA without a KL term": ("dgpo", {"reference": "ema", "kl": 0.0}, [POLICY, OLD]),
    # the old policy is the policy
    "AWM": ("awm", {}, [POLICY, REF]),
    "DiffusionNFT": ("diffusion_nft", {}, [POLICY, REF]),
    "CRD": ("crd", {}, [POLICY, GUIDED]),
    "regression": ("rwr", {}, [POLICY]),
    # which the rollout has recorded
    "Flow-GRPO": ("flow_grpo", {}, [POLICY, REF]),
    "DanceGRPO": ("flow_grpo", {"sde": {"kind": "dance"}, "kl": 0.0}, [POLICY]),
}


@pytest.mark.parametrize("mode", PASSES)
def test_no_prediction_is_made_twice(mode: str, on: Device) -> None:
    """At each level of each micro-batch; auto means whole groups, and no second pass to weigh one.

    Groups of twelve: sixteen samples have room for one."""
    name, own, passes = PASSES[mode]
    case = Case(on, name, size=12, algorithm=own)
    case.update()
    points = 2 * 2  # groups, and levels or steps of the sampler
    assert case.policy.passes == dict.fromkeys(passes, points)


def test_only_a_part_of_a_group_is_predicted_twice_by_the_policy(on: Device) -> None:
    case = Case(on, "dgpo", train={"micro_batch": 2})
    case.update()
    assert case.policy.passes == {POLICY: 2 * 8, REF: 8, OLD: 8}


def test_the_old_policy_is_asked_once_it_lags(on: Device) -> None:
    case = Case(on, "diffusion_nft")
    case.update(iteration=50)
    assert case.policy.passes == dict.fromkeys((POLICY, REF, OLD), 2)


SAMPLERS: dict[str, tuple[int, int]] = {
    # numbers read, and copies to the device that wait, at every step but the first
    "euler": (0, 0),
    "dpmsolver++": (0, 0),
    "flow": (0, 0),  # with noise
    "ddim": (2, 0),  # with noise; the table of alphas is looked up by the timestep
    "heun": (3, 0),  # diffusers' own, as are the lists of numbers that UniPC makes tensors of
    "unipc": (0, 6),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_a_rollout_step_waits_for(sampler: str, on: Device) -> None:
    base = FlowMatchEulerDiscreteScheduler()
    if sampler in ("flow", "ddim"):
        sde, base = FlowSDE(), base
        if sampler == "ddim":
            sde, base = DDIM(), DDIMScheduler(clip_sample=False)
        scheduler = with_noise(make_sde_scheduler(sde, base), range(3), (1, 2))
    else:
        scheduler = make_scheduler(sampler, base)
    recording = Recording()
    recording.listen(scheduler)
    scheduler.set_timesteps(5, device=META)
    sample, waits = on.hold(torch.randn(2, *SHAPE)), []
    for timestep in scheduler.timesteps:
        on.waits.clear()
        made = scheduler.step(sample, timestep, sample, return_dict=False)[0]
        assert isinstance(made, Held) and bool(made.numbers.isfinite().all())
        waits.append(Counter(on.waits))
    assert len(recording.levels) == 5
    waited = ", ".join(f"{count} {kind}" for kind, count in sorted(waits[2].items()))
    print(f"{sampler}, a rollout step: {waited}")
    reads, sends = SAMPLERS[sampler]
    for each in waits[1:]:
        assert each["read"] <= reads and each["send"] <= sends and not each["copy"]
    assert waits[0]["read"] <= 4 and waits[0]["copy"] <= 1
