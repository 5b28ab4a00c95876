"""Noising processes: how a clean sample is corrupted and what the denoiser should answer.

Noise enters here in full precision: half-precision inputs give float32 results, float64 stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dgpo.core.precision import widen_pair
from dgpo.errors import UserError


@dataclass(frozen=True)
class Level:
    """One noise level of a rollout's schedule.

    Args:
        timestep: 0-dim, as the scheduler hands it to the denoiser.
        sigma: the same level in [0, 1]. Flow matching: the scheduler's own sigma (1 is pure noise,
            unless the schedule is inverted). Noise- and v-prediction: ``sqrt(1 - alphas_cumprod)``
            of the scheduler's own table, or between two of its entries where a sampler's timesteps
            are no whole numbers.
    """

    timestep: Tensor
    sigma: float


class Process(Protocol):
    """``x0``, ``noise``, ``xt``, ``output`` are ``[B, ...]`` of one shape, at one level.

    The methods that take two of them raise ValueError if the shapes differ.
    """

    def noise_level(self, level: Level) -> float:
        """The factor of the noise in ``xt``, in [0, 1]: 1 is pure noise, whatever the schedule."""
        ...

    def corrupt(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """The noised sample ``xt``."""
        ...

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """What a perfect denoiser would answer at ``xt`` if it knew ``x0`` and ``noise``."""
        ...

    def x0(self, xt: Tensor, output: Tensor, level: Level) -> Tensor:
        """The clean sample that the denoiser's ``output`` at ``xt`` amounts to."""
        ...


@dataclass(frozen=True)
class FlowMatching:
    """Straight paths ``xt = (1 - s) x0 + s e`` with velocity ``e - x0`` (rectified flow,
    arXiv 2209.03003).

    Args:
        inverted: the schedule's sigma counts the clean share (Mochi): ``s = 1 - sigma`` and the
            denoiser answers ``x0 - e``, so that ``x0 = xt + (1 - sigma) output``.
    """

    inverted: bool = False

    def noise_level(self, level: Level) -> float:
        return 1 - level.sigma if self.inverted else level.sigma

    def corrupt(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        x0, noise = widen_pair(x0, noise, "x0 and noise")
        s = self.noise_level(level)
        return (1 - s) * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        x0, noise = widen_pair(x0, noise, "x0 and noise")
        return x0 - noise if self.inverted else noise - x0

    def x0(self, xt: Tensor, output: Tensor, level: Level) -> Tensor:
        xt, output = widen_pair(xt, output, "xt and output")
        return xt + (1 - level.sigma) * output if self.inverted else xt - level.sigma * output


@dataclass(frozen=True, eq=False)
class _VariancePreserving:
    """``xt = sqrt(a) x0 + sqrt(1 - a) e`` with ``a = alphas_cumprod[timestep]`` (DDPM,
    arXiv 2006.11239, eq. 4), which a level holds as ``sigma = sqrt(1 - a)``.

    Args:
        alphas_cumprod: the scheduler's table ``[T]``, decreasing.
    """

    alphas_cumprod: Tensor

    def level(self, timestep: Tensor) -> Level:
        """The level of a whole timestep, with ``sigma = sqrt(1 - a)``.

        Raises:
            UserError: the timestep is no index of ``alphas_cumprod``.
        """
        t, last = float(timestep), len(self.alphas_cumprod) - 1
        if not t.is_integer() or not 0 <= t <= last:
            raise UserError(
                f"timestep {t} is no index of alphas_cumprod (0..{last}): choose a rollout "
                "scheduler whose timesteps are whole numbers, e.g. rollout.scheduler=ddim"
            )
        return Level(timestep, math.sqrt(1 - float(self.alphas_cumprod[int(t)])))

    def noise_level(self, level: Level) -> float:
        return level.sigma

    def corrupt(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        x0, noise = widen_pair(x0, noise, "x0 and noise")
        signal, sigma = self._scales(level)
        return signal * x0 + sigma * noise

    def _scales(self, level: Level) -> tuple[float, float]:
        """``sqrt(a), sqrt(1 - a)``."""
        return math.sqrt(1 - level.sigma**2), level.sigma


@dataclass(frozen=True, eq=False)
class Epsilon(_VariancePreserving):
    """Noise prediction: the denoiser answers ``e``, and ``x0 = (xt - sqrt(1-a) e) / sqrt(a)``
    (DDPM, arXiv 2006.11239). ``x0`` is undefined where ``a = 0``."""

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        return widen_pair(x0, noise, "x0 and noise")[1]

    def x0(self, xt: Tensor, output: Tensor, level: Level) -> Tensor:
        xt, output = widen_pair(xt, output, "xt and output")
        signal, sigma = self._scales(level)
        return (xt - sigma * output) / signal


@dataclass(frozen=True, eq=False)
class VPrediction(_VariancePreserving):
    """Velocity ``v = sqrt(a) e - sqrt(1-a) x0``, so that ``x0 = sqrt(a) xt - sqrt(1-a) v``
    (progressive distillation, arXiv 2202.00512, app. D)."""

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        x0, noise = widen_pair(x0, noise, "x0 and noise")
        signal, sigma = self._scales(level)
        return signal * noise - sigma * x0

    def x0(self, xt: Tensor, output: Tensor, level: Level) -> Tensor:
        xt, output = widen_pair(xt, output, "xt and output")
        signal, sigma = self._scales(level)
        return signal * xt - sigma * output
