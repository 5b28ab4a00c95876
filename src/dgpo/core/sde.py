"""A stochastic sampler's step has a mean, a deviation and a log-density.

A sampler goes from one noise level to the next, less noisy one, by ``x' = mean + std z`` with
``z ~ N(0, I)``. The noise gives the step a density, which the policy gradient needs. Flow-SDE,
Dance-SDE and DDIM keep the marginal distributions in the limit of many steps; CPS keeps the
coefficients of x0 and noise in every step.

Notation for flow matching: ``s -> s'`` are the two sigmas, ``dt = s' - s < 0``, and ``v`` is the
velocity. Notation for noise and v prediction: ``a = 1 - s^2`` and ``a' = 1 - s'^2`` are the
scheduler's alphas_cumprod.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from torch import Tensor

from dgpo.core.precision import mean_square, widen_pair
from dgpo.core.process import FlowMatching, Level, Process

_PURE_NOISE = 1 - 1e-6  # a sigma of 1 that went through float32


@dataclass(frozen=True, eq=False)
class Moments:
    """``Moments`` describe the Gaussian of one step, ``N(mean, std^2)`` in every dimension.

    Args:
        mean: ``[B, ...]``, float32 (float64 stays); gradients flow through it.
        std: the deviation of the noise that the step adds, above 0.
        rate: the diffusion coefficient ``std / sqrt(-dt)`` if the sampler discretises an SDE, else
            (CPS, DDIM) ``std``.
    """

    mean: Tensor
    std: float
    rate: float

    def kl(self, other: Moments) -> Tensor:
        """Return the divergence of two steps of equal ``std``, the mean over dimensions: ``[B]``.

        It is ``mean (mean - mean')^2 / (2 std^2)``.

        Raises:
            ValueError: the shapes differ.
        """
        return mean_square(self.mean, other.mean) / (2 * self.std**2)


class Sde(BaseModel, ABC):
    """An ``Sde`` holds the settings of one stochastic sampler and the mathematics of its step."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    def fits(self, process: Process) -> bool:
        """Return whether the sampler works for this noising process."""
        return isinstance(process, FlowMatching) and not process.inverted

    def moments(
        self, process: Process, xt: Tensor, output: Tensor, level: Level, next_level: Level
    ) -> Moments:
        """Return the mean and the deviation of the step from ``xt``.

        Args:
            process: says what the denoiser's ``output`` means.
            xt: ``[B, ...]`` at ``level``.
            output: the denoiser's answer there, ``[B, ...]``.
            level, next_level: where the step begins and ends, both with noise (the last step of a
                schedule, to sigma 0, has no density).

        Raises:
            ValueError: the sampler does not fit the process, the noise does not fall from
                ``level`` to ``next_level`` > 0, or two shapes differ.
        """
        if not self.fits(process):
            raise ValueError(f"{type(self).__name__} is no sampler of {type(process).__name__}")
        s, s_next = level.sigma, next_level.sigma
        if not 1 >= s > s_next > 0:
            raise ValueError(f"a step with a density goes from s to 0 < s' < s, got {s}, {s_next}")
        xt, output = widen_pair(xt, output, "xt and output")
        return self._moments(process, xt, output, level, s_next)

    def log_prob(self, value: Tensor, moments: Moments) -> Tensor:
        """Return the log-density of ``value [B, ...]``, the MEAN over all dims but the first:
        ``[B]``.

        Raises:
            ValueError: the shapes differ.
        """
        exponent = mean_square(value, moments.mean) / (2 * moments.std**2)
        return -exponent - math.log(moments.std) - 0.5 * math.log(2 * math.pi)

    @abstractmethod
    def _moments(
        self, process: Process, xt: Tensor, output: Tensor, level: Level, s_next: float
    ) -> Moments: ...


def reverse_sde(xt: Tensor, v: Tensor, s: float, s_next: float, rate: float) -> Moments:
    """Make an Euler-Maruyama step of the SDE that has the marginals of the flow.

    With ``rate`` the diffusion coefficient, ``mean = x + [v + rate^2/(2s) (x + (1-s) v)] dt`` and
    ``std = rate sqrt(-dt)``; ``-(x + (1-s) v)/s`` is the score.

    Source: Flow-GRPO (arXiv 2505.05470), section 4.2.
    """
    dt = s_next - s
    drift = v + rate**2 / (2 * s) * (xt + (1 - s) * v)
    return Moments(xt + dt * drift, rate * math.sqrt(-dt), rate)


class FlowSDE(Sde):
    """Flow-SDE has the diffusion coefficient ``noise_level sqrt(s / (1 - s))``.

    At s = 1 the denominator takes the next sigma. Source: Flow-GRPO (arXiv 2505.05470), section
    4.2.

    >>> import torch
    >>> from dgpo.core import FlowMatching, Level
    >>> now, after = (Level(torch.tensor(1000.0 * s), s) for s in (0.5, 0.41))
    >>> xt, velocity = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    >>> step = FlowSDE(noise_level=0.5).moments(FlowMatching(), xt, velocity, now, after)
    >>> step.mean, round(step.std, 3)
    (tensor([[0.7750]]), 0.15)
    """

    kind: Literal["flow"] = "flow"
    noise_level: float = Field(default=0.7, gt=0)
    """The noise level, the a of the paper."""

    def _moments(
        self, process: Process, xt: Tensor, output: Tensor, level: Level, s_next: float
    ) -> Moments:
        s = level.sigma
        rest = 1 - (s_next if s >= _PURE_NOISE else s)
        return reverse_sde(xt, output, s, s_next, self.noise_level * math.sqrt(s / rest))


class DanceSDE(Sde):
    """Dance-SDE is the same SDE with a constant diffusion coefficient, ``noise_level``.

    Source: DanceGRPO (arXiv 2505.07818), section 3.1, which writes the score as
    ``-(x - (1-s) x0) / s^2``.
    """

    kind: Literal["dance"] = "dance"
    noise_level: float = Field(default=0.3, gt=0)
    """The noise level, the eta of the paper."""

    def _moments(
        self, process: Process, xt: Tensor, output: Tensor, level: Level, s_next: float
    ) -> Moments:
        return reverse_sde(xt, output, level.sigma, s_next, self.noise_level)


class CPS(Sde):
    """CPS, coefficients-preserving sampling, draws a part of the next level's noise anew.

    The new noise has ``std = s' sin(pi noise_level / 2)``; the rest is the noise that the model
    sees: ``mean = (1-s') x0 + sqrt(s'^2 - std^2) x1``, ``x0 = x - s v`` and ``x1 = x + (1-s) v``.
    Where x0 is certain, every level's marginal is exact, however few the steps; where it is not,
    each step loses some variance. The log-probability is simplified, as in the published runs:
    ``-mean (x' - mean)^2``.

    Source: arXiv 2509.05952.
    """

    kind: Literal["cps"] = "cps"
    noise_level: float = Field(default=0.7, gt=0, le=1)
    """The share of new noise; 1 replaces all of it."""

    def log_prob(self, value: Tensor, moments: Moments) -> Tensor:
        return -mean_square(value, moments.mean)

    def _moments(
        self, process: Process, xt: Tensor, output: Tensor, level: Level, s_next: float
    ) -> Moments:
        angle = math.pi / 2 * self.noise_level
        std, kept = s_next * math.sin(angle), s_next * math.cos(angle)
        clean = xt - level.sigma * output
        noise = xt + (1 - level.sigma) * output
        return Moments((1 - s_next) * clean + kept * noise, std, std)


class DDIM(Sde):
    """DDIM with noise has ``std = eta (s'/s) sqrt(1 - a/a')``.

    Its mean is ``sqrt(a') x0 + sqrt(s'^2 - std^2) e``, with the x0 and e that the output stands
    for. With ``eta`` 1 it is the sampler of DDPM.

    Source: DDIM (arXiv 2010.02502), eq. 12 and 16.
    """

    kind: Literal["ddim"] = "ddim"
    eta: float = Field(default=1.0, gt=0, le=1)
    """How much of DDPM's noise is added, as a share."""

    def fits(self, process: Process) -> bool:
        return not isinstance(process, FlowMatching)

    def _moments(
        self, process: Process, xt: Tensor, output: Tensor, level: Level, s_next: float
    ) -> Moments:
        s = level.sigma
        a, a_next = 1 - s**2, 1 - s_next**2
        std = self.eta * s_next / s * math.sqrt(1 - a / a_next)
        clean = process.x0(xt, output, level)
        noise = (xt - math.sqrt(a) * clean) / s
        return Moments(math.sqrt(a_next) * clean + math.sqrt(s_next**2 - std**2) * noise, std, std)


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return value.get("kind", "ddim" if "eta" in value else "flow")
    return getattr(value, "kind", "flow")


AnySde = Annotated[
    Annotated[FlowSDE, Tag("flow")]
    | Annotated[DanceSDE, Tag("dance")]
    | Annotated[CPS, Tag("cps")]
    | Annotated[DDIM, Tag("ddim")],
    Discriminator(
        _kind,
        custom_error_type="unknown_sde",
        custom_error_message="kind should be flow, dance, cps or ddim",
    ),
]
"""Holds the settings of any sampler, told apart by ``kind``: ``{kind: flow, noise_level: 0.7}``."""
