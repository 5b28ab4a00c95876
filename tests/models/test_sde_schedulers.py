"""Stochastic rollouts through whole pipelines: whose noise, at which steps, and what it repeats."""

from __future__ import annotations

from collections.abc import Container
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dgpo.core import CPS, DDIM, DanceSDE, FlowSDE, Sde
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.models.samplers.sde_schedulers import make_sde_scheduler, with_noise
from families.tiny import TINY, build, conditioning

STEPS, ROWS = 4, 2
SAMPLERS: dict[str, Sde] = {
    "sd3": FlowSDE(),
    "flux": CPS(),
    "wan": DanceSDE(),
    "sana": FlowSDE(),
    "qwen": FlowSDE(),
    "zimage": CPS(),
    "sd15": DDIM(),
    "sdxl": DDIM(eta=0.5),
    "audioldm2": DDIM(),
}


class Case:
    def __init__(self, name: str, sde: Sde | None = None, dtype: Any = torch.float32) -> None:
        self.model = PipelineModel(build(name).to(dtype), call=TINY[name].call)
        self.cond = conditioning(name, self.model, ROWS)
        self.sde = sde or SAMPLERS[name]
        self.scheduler = make_sde_scheduler(self.sde, self.model.pipe.scheduler)

    def rollout(
        self,
        noisy: Container[int] = range(STEPS - 1),
        seeds: tuple[int, ...] = (1, 2),
        cond: Conditioning | None = None,
        guidance: float = 1.0,
    ) -> Rollout:
        return self.model.rollout(
            cond or self.cond,
            steps=STEPS,
            guidance_scale=guidance,
            scheduler=with_noise(self.scheduler, noisy, seeds),
            generators=[torch.Generator().manual_seed(0) for _ in seeds],
            decode=False,
            record=True,
        )


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_rollout_is_repeated_by_replaying_its_steps(name: str) -> None:
    """The ratio is exactly 1, guidance off and on, whatever the pipeline does around its step."""
    case = Case(name)
    for guidance in (1.0, 3.0):
        made = case.rollout(guidance=guidance)
        assert (
            [step.index for step in made.steps]
            == list(range(STEPS))
            == list(range(len(made.levels)))
        )
        for step, then in zip(made.steps[:-1], made.levels[1:], strict=True):
            with torch.no_grad():
                again = case.model.predict(step.sample, step.level, case.cond, guidance)
            old, now = (
                case.sde.moments(case.model.process, step.sample, out, step.level, then)
                for out in (step.output, again)
            )
            log_ratio = case.sde.log_prob(step.previous, now) - case.sde.log_prob(
                step.previous, old
            )
            assert torch.equal(log_ratio, torch.zeros(ROWS))
            drawn = (step.previous - old.mean) / old.std  # it is the noise, N(0, I)
            assert drawn.std() == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_a_row_depends_on_its_seed_alone(name: str) -> None:
    case = Case(name)
    both, other = case.rollout(), case.rollout(seeds=(1, 3))
    assert torch.equal(both.x0[0], other.x0[0])
    assert not torch.allclose(both.x0[1], other.x0[1], atol=1e-2)
    alone = case.rollout(seeds=(2,), cond=case.cond.rows(torch.tensor([1])))
    torch.testing.assert_close(alone.x0[0], both.x0[1], rtol=1e-4, atol=1e-4)
    same = case.rollout(seeds=(5, 5), cond=case.cond.rows(torch.tensor([0, 0])))
    torch.testing.assert_close(same.x0[0], same.x0[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "plain"), [("sd3", "euler"), ("wan", "euler"), ("sd15", "ddim")])
def test_noise_inside_the_window_and_the_ode_outside(name: str, plain: str) -> None:
    case = Case(name)
    ode = case.model.rollout(
        case.cond,
        steps=STEPS,
        scheduler=make_scheduler(plain, case.model.pipe.scheduler),
        generators=[torch.Generator().manual_seed(0) for _ in range(ROWS)],
        decode=False,
        record=True,
    )
    without, window, all_steps = case.rollout(()), case.rollout(range(1, 2)), case.rollout()
    torch.testing.assert_close(without.x0, ode.x0, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(without.levels, ode.levels, strict=True):
        assert mine.sigma == theirs.sigma and mine.timestep == theirs.timestep
    assert torch.equal(window.steps[0].previous, without.steps[0].previous)
    assert not torch.allclose(window.steps[1].previous, without.steps[1].previous, atol=1e-2)
    # a step has the same noise whichever other steps have any
    first = case.rollout(range(1)).steps[0]
    assert torch.equal(first.previous, all_steps.steps[0].previous)
    last, level = all_steps.steps[-1], all_steps.levels[-1]
    clean = case.model.process.x0(last.sample, last.output, level)
    if plain == "euler":  # DDIM ends at the noise of its table's first entry
        torch.testing.assert_close(last.previous, clean, rtol=1e-5, atol=1e-5)


def test_only_the_steps_asked_for_are_recorded() -> None:
    case = Case("sd3")
    made = case.model.rollout(
        case.cond,
        steps=STEPS,
        scheduler=with_noise(case.scheduler, range(1, 3), (1, 2)),
        decode=False,
        record=range(1, 3),
    )
    assert [step.index for step in made.steps] == [1, 2]
    assert [step.level for step in made.steps] == made.levels[1:3]


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_the_density_is_that_of_the_value_after_its_cast(name: str) -> None:
    case = Case(name, dtype=torch.bfloat16)
    steps = case.rollout().steps
    for step, then in pairwise(steps):
        assert step.output.dtype == step.previous.dtype == torch.bfloat16
        assert torch.equal(step.previous, then.sample)  # nothing is rounded after it is recorded


def test_shift_and_steps_are_those_of_the_pipeline() -> None:
    base = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    made = make_sde_scheduler(FlowSDE(), base)
    assert isinstance(made, FlowMatchEulerDiscreteScheduler) and made.config["shift"] == 5.0
    config = {"beta_schedule": "scaled_linear", "beta_end": 0.012, "clip_sample": False}
    made = make_sde_scheduler(DDIM(), DDIMScheduler(**config, timestep_spacing="trailing"))
    assert made.config["timestep_spacing"] == "trailing" and made.config["beta_end"] == 0.012


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_goes_to_the_next_level_of_its_schedule(spacing: str) -> None:
    """A denoiser that answers the true noise keeps the sample on its path, level by level."""
    made = make_sde_scheduler(DDIM(), DDIMScheduler(clip_sample=False, timestep_spacing=spacing))
    made.set_timesteps(7)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 2, 3, generator=generator)
    process: Any = made.process
    sample = process.corrupt(clean, noise, process.level(made.timesteps[0]))
    for now, then in zip(made.timesteps[:-1], made.timesteps[1:], strict=True):
        sample = made.step(noise, now, sample)[0]
        expected = process.corrupt(clean, noise, process.level(then))
        torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)


def test_inverted_sigmas_are_refused() -> None:
    mochi = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    for sde in (FlowSDE(), CPS()):
        with pytest.raises(UserError, match=r"inverted sigmas \(Mochi\)"):
            make_sde_scheduler(sde, mochi)


def test_a_sampler_of_the_other_process_is_refused() -> None:
    with pytest.raises(UserError, match=r"kind = 'ddim'.*FlowMatching: use flow, dance or cps"):
        make_sde_scheduler(DDIM(), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(UserError, match=r"kind = 'flow'.*Epsilon: use ddim"):
        make_sde_scheduler(FlowSDE(), DDIMScheduler(clip_sample=False))


def test_schedules_that_cannot_be_carried_are_refused() -> None:
    for setting in ("clip_sample", "thresholding"):
        base = DDIMScheduler(**{"clip_sample": False, setting: True})
        with pytest.raises(UserError, match=f"clips x0 \\({setting}\\)"):
            make_sde_scheduler(DDIM(), base)
    with pytest.raises(UserError, match="snr_shift_scale"):
        make_sde_scheduler(DDIM(), CogVideoXDDIMScheduler(clip_sample=False, snr_shift_scale=3.0))


def test_every_row_needs_a_seed() -> None:
    with pytest.raises(UserError, match="seeds of 1 rows and was given 2"):
        case = Case("sd3")
        case.model.rollout(
            case.cond,
            steps=STEPS,
            scheduler=with_noise(case.scheduler, range(STEPS - 1), (1,)),
            decode=False,
        )
