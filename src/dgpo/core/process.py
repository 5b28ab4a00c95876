"""A noising process says how a clean sample is corrupted and what the denoiser should answer.

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
    """A ``Level`` is one noise level of a rollout's schedule.

    Args:
        timestep: 0-dim, as the scheduler hands it to the denoiser.
        sigma: the same level in [0, 1]. Flow matching takes the scheduler's own sigma (1 is pure
            noise, unless the schedule is inverted). Noise and v prediction take
            ``sqrt(1 - alphas_cumprod)`` from the scheduler's table, or between two of its entries
            if the sampler's timesteps are no whole numbers.
    """

    timestep: Tensor
    sigma: float


class Process(Protocol):
    """A ``Process`` relates clean samples, noise, noised samples and the denoiser's output.

    ``x0``, ``noise``, ``xt`` and ``output`` are ``[B, ...]`` of one shape, at one level. A method
    that takes two of them raises ValueError if the shapes differ.
    """

    def noise_level(self, level: Level) -> float:
        """Return the factor of the noise in ``xt``, in [0, 1]; 1 is always pure noise."""
        ...

    def corrupt(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """Return the noised sample ``xt``."""
        ...

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """Return what a perfect denoiser would answer at ``xt`` if it knew ``x0`` and ``noise``."""
        ...

    def x0(self, xt: Tensor, output: Tensor, level: Level) -> Tensor:
        """Return the clean sample that the denoiser's ``output`` at ``xt`` amounts to."""
        ...


@dataclass(frozen=True)
class FlowMatching(Process):
    """Flow matching moves on straight paths ``xt = (1 - s) x0 + s e`` with velocity ``e - x0``.

    Source: rectified flow (arXiv 2209.03003).

    Args:
        inverted: the schedule's sigma counts the clean share (Mochi): ``s = 1 - sigma`` and the
            denoiser answers ``x0 - e``, so that ``x0 = xt + (1 - sigma) output``.

    >>> import torch
    >>> process, level = FlowMatching(), Level(torch.tensor(250.0), sigma=0.25)
    >>> x0, noise = torch.tensor([[4.0]]), torch.tensor([[0.0]])
    >>> xt = process.corrupt(x0, noise, level)
    >>> xt, process.x0(xt, process.target(x0, noise, level), level)
    (tensor([[3.]]), tensor([[4.]]))
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
class _VariancePreserving(Process):
    """The noised sample is ``xt = sqrt(a) x0 + sqrt(1 - a) e``, ``a = alphas_cumprod[timestep]``.

    A level holds a as ``sigma = sqrt(1 - a)``. Source: DDPM (arXiv 2006.11239), eq. 4.

    Args:
        alphas_cumprod: the scheduler's table ``[T]``, decreasing.
    """

    alphas_cumprod: Tensor

    def level(self, timestep: Tensor) -> Level:
        """Return the level of a whole timestep, with ``sigma = sqrt(1 - a)``.

        Raises:
            UserError: the timestep is no index of ``alphas_cumprod``.
        """
        t, last = float(timestep), len(self.alphas_cumprod) - 1
        if not t.is_integer() or not 0 <= t <= last:
            raise UserError(
                f"timestep {t} is no index of alphas_cumprod (0..{last}): choose a sampler whose "
                "timesteps are whole numbers, such as rollout.scheduler=ddim"
            )
        return Level(timestep, math.sqrt(1 - float(self.alphas_cumprod[int(t)])))

    def noise_level(self, level: Level) -> float:
        return level.sigma

    def corrupt(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        x0, noise = widen_pair(x0, noise, "x0 and noise")
        signal, sigma = self._scales(level)
        return signal * x0 + sigma * noise

    def _scales(self, level: Level) -> tuple[float, float]:
        """Return ``sqrt(a), sqrt(1 - a)``."""
        return math.sqrt(1 - level.sigma**2), level.sigma


@dataclass(frozen=True, eq=False)
class Epsilon(_VariancePreserving):
    """The denoiser answers the noise ``e``, so that ``x0 = (xt - sqrt(1-a) e) / sqrt(a)``.

    ``x0`` is undefined where ``a = 0``. Source: DDPM (arXiv 2006.11239).

    >>> import torch
    >>> round(Epsilon(torch.tensor([0.91, 0.36])).level(torch.tensor(1)).sigma, 3)
    0.8
    """

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        return widen_pair(x0, noise, "x0 and noise")[1]

    def x0(self, xt: Tensor, output: Tensor, level: Level) -> Tensor:
        xt, output = widen_pair(xt, output, "xt and output")
        signal, sigma = self._scales(level)
        return (xt - sigma * output) / signal


@dataclass(frozen=True, eq=False)
class VPrediction(_VariancePreserving):
    """The denoiser answers ``v = sqrt(a) e - sqrt(1-a) x0``.

    So ``x0 = sqrt(a) xt - sqrt(1-a) v``.

    Source: progressive distillation (arXiv 2202.00512), app. D.
    """

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        x0, noise = widen_pair(x0, noise, "x0 and noise")
        signal, sigma = self._scales(level)
        return signal * noise - sigma * x0

    def x0(self, xt: Tensor, output: Tensor, level: Level) -> Tensor:
        xt, output = widen_pair(xt, output, "xt and output")
        signal, sigma = self._scales(level)
        return signal * xt - sigma * output
