"""Stochastic samplers as diffusers schedulers: a thin layer over :mod:`dgpo.core.sde`.

A pipeline drives them like any scheduler. Only ``step`` is written here; schedule, shift and
timesteps stay diffusers' own. Pipelines hand no generator to ``step``, so the schedulers hold a
seed for every row. A picture depends neither on its batch nor on which other steps add noise.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from dgpo.core.precision import widen
from dgpo.core.process import Level, Process
from dgpo.core.sde import DDIM, Sde
from dgpo.core.seeds import stream
from dgpo.core.transfer import sent
from dgpo.errors import UserError
from dgpo.models.samplers import schedulers

_ELSE = "use an algorithm on noised samples, such as dgpo"


class _Noisy:
    """``_Noisy`` is what both schedulers add to diffusers' own: sampler, noisy steps and seeds."""

    sde: Sde
    process: Process
    noisy: Container[int] = ()
    seeds: Sequence[int] = ()

    def _noised(
        self, output: Tensor, sample: Tensor, index: int, level: Level, next_level: Level
    ) -> Tensor:
        """Return the sample after a step that adds noise, in the dtype of ``output``.

        Training computes the density of exactly this sample, rounding included.
        """
        if len(self.seeds) != len(sample):
            raise UserError(
                f"{type(self).__name__} holds the seeds of {len(self.seeds)} rows and was given "
                f"{len(sample)}: call with_noise with one seed for each row of the batch"
            )
        moments = self.sde.moments(self.process, sample, output, level, next_level)
        drawn = [
            torch.randn(sample.shape[1:], generator=stream(seed, "step", index))
            for seed in self.seeds
        ]
        # drawn on the CPU, row by row: the same numbers on any device and in any batch
        noise = sent(torch.stack(drawn), moments.mean).to(moments.mean)
        return (moments.mean + moments.std * noise).to(output.dtype)


class FlowMatchSdeScheduler(_Noisy, FlowMatchEulerDiscreteScheduler):
    """The noisy steps are Flow-SDE, Dance-SDE or CPS; the others, and the last, are Euler's."""

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **how: Any
    ) -> Any:
        if self.step_index is None:
            self._init_step_index(timestep)
        index = self.step_index
        assert index is not None and self.timesteps is not None and self.sigmas is not None
        s, s_next = schedulers.on_host(self, "sigmas")[index : index + 2]
        # the last step has no noise: its density would be a point
        if index not in self.noisy or s_next == 0:
            dictionary = how.get("return_dict", True)
            return super().step(model_output, timestep, sample, return_dict=dictionary)  # pyright: ignore
        self._step_index = index + 1
        now = Level(torch.as_tensor(timestep), s)
        then = Level(torch.as_tensor(self.timesteps[index + 1]), s_next)
        return _answer(self._noised(model_output, sample, index, now, then), **how)


class DdimSdeScheduler(_Noisy, DDIMScheduler):
    """All steps are DDIM's, and the noisy ones add noise.

    Every step goes to the next level of the schedule, and x0 is not clipped.
    """

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **how: Any
    ) -> Any:
        index = schedulers.on_host(self, "timesteps").index(float(timestep))
        now = self._level(index)
        if index + 1 < len(self.timesteps):
            then = self._level(index + 1)
            if index in self.noisy:
                return _answer(self._noised(model_output, sample, index, now, then), **how)
            a_next = 1 - then.sigma**2
        else:
            a_next = float(self.final_alpha_cumprod)
        # written here and not taken from DDIM's step, which looks up another next level
        clean = self.process.x0(sample, model_output, now)
        noise = (widen(sample) - math.sqrt(1 - now.sigma**2) * clean) / now.sigma
        mean = math.sqrt(a_next) * clean + math.sqrt(1 - a_next) * noise
        return _answer(mean.to(model_output.dtype), **how)

    def _level(self, index: int) -> Level:
        time = int(schedulers.on_host(self, "timesteps")[index])
        return Level(self.timesteps[index], math.sqrt(1.0 - float(self.alphas_cumprod[time])))


def _answer(sample: Tensor, return_dict: bool = True, **_: Any) -> Any:
    """Return a step's sample in the form that the pipeline asks for: AudioLDM2 wants the object."""
    return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)


SdeScheduler = FlowMatchSdeScheduler | DdimSdeScheduler


def make_sde_scheduler(sde: Sde, base: Any, key: str = "algorithm.sde") -> SdeScheduler:
    """Return the stochastic sampler with the schedule of a pipeline's scheduler (above all its
    shift).

    It adds no noise until :func:`with_noise` says at which steps.

    Args:
        sde: the sampler's settings.
        base: the scheduler of the pipeline.
        key: the recipe's key, for errors.

    Raises:
        UserError: the sampler does not fit the pipeline's prediction type, or the scheduler has
            inverted sigmas (Mochi) or other settings that the sampler cannot carry.
    """
    kind, process = getattr(sde, "kind", type(sde).__name__), schedulers.process_of(base)
    if base.config.get("invert_sigmas"):
        raise UserError(
            f"{key}: {type(base).__name__} has inverted sigmas (Mochi), for which no "
            f"stochastic sampler is defined here; {_ELSE}"
        )
    if not sde.fits(process):
        fitting = (
            "flow, dance or cps" if schedulers.is_flow_matching(base) else "ddim (algorithm ddpo)"
        )
        raise UserError(
            f"{key}.kind = {kind!r} does not fit a pipeline whose denoiser answers "
            f"{type(process).__name__}: use {fitting}"
        )
    if not isinstance(sde, DDIM):
        made = FlowMatchSdeScheduler.from_config(schedulers.make_scheduler("euler", base).config)
    else:
        made = DdimSdeScheduler.from_config(_ddim_config(base, key))
    assert isinstance(made, SdeScheduler)
    made.sde, made.process = sde, process
    return made


def with_noise(scheduler: SdeScheduler, steps: Container[int], seeds: Sequence[int]) -> Any:
    """Return a fresh copy that adds noise at some steps, for one batch.

    Args:
        scheduler: from :func:`make_sde_scheduler`.
        steps: positions in the schedule; the last step stays deterministic.
        seeds: one a row. The noise of a row at a step depends on its seed and the step alone.
    """
    made = schedulers.fresh(scheduler)
    made.noisy, made.seeds = steps, tuple(seeds)
    return made


def _ddim_config(base: Any, key: str) -> dict[str, Any]:
    config = base.config
    if config.get("snr_shift_scale", 1.0) != 1.0:
        raise UserError(
            f"{key}: DDIM with noise cannot carry snr_shift_scale of {type(base).__name__}; {_ELSE}"
        )
    if schedulers.is_continuous(base):
        raise UserError(
            f"{key}: DDIM with noise does not know the noise levels of {type(base).__name__}; "
            f"{_ELSE}"
        )
    for clips in ("clip_sample", "thresholding"):
        if config.get(clips):
            raise UserError(
                f"{key}: {type(base).__name__} clips x0 ({clips}), and a clipped step has no "
                "Gaussian density: the sampler of the trained model must not clip"
            )
    return dict(schedulers.make_scheduler("ddim", base).config)
