"""Points: what a loss sees of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dgpo.core.groups import Groups
from dgpo.core.precision import mean_square
from dgpo.core.process import Level, Process


@dataclass(frozen=True, eq=False)
class Forward:
    """Clean samples noised again to one level, and the predictions there.

    Args:
        x0, noise, xt, target: ``[B, ...]`` in the denoiser's own input space, full precision.
        level: the noise level, shared by all samples.
        process: how ``xt`` was made of ``x0`` and ``noise``.
        pred: the policy's prediction, ``[B, ...]``; gradients flow through it alone.
        ref: the frozen reference's prediction, without guidance; None if not declared.
        old: the old policy's prediction; None if not declared.
        kl_ref: the prediction the KL term compares with when it wants its own guidance.
        advantages: ``[B]``.
        groups: the group of each sample.
        weights: detached group weights ``[B]`` from a pass over whole groups, for a micro-batch
            that does not hold whole groups.

    Raises:
        ValueError: two shapes do not fit together.
    """

    x0: Tensor
    noise: Tensor
    xt: Tensor
    target: Tensor
    level: Level
    process: Process
    pred: Tensor
    ref: Tensor | None
    old: Tensor | None
    kl_ref: Tensor | None
    advantages: Tensor
    groups: Groups
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("x0", "noise", "xt", "target", "ref", "old", "kl_ref"):
            value = getattr(self, name)
            if value is not None and value.shape != self.pred.shape:
                shapes = f"{tuple(value.shape)} and {tuple(self.pred.shape)}"
                raise ValueError(f"{name} and pred must have one shape, got {shapes}")
        batch = self.pred.shape[:1]
        index = self.groups.index
        for name, value in (
            ("advantages", self.advantages),
            ("groups", index),
            ("weights", self.weights),
        ):
            if value is not None and value.shape != batch:
                got = f"{tuple(batch)}, got {tuple(value.shape)}"
                raise ValueError(f"{name} must be one number a sample, shape {got}")

    def error(self, out: Tensor) -> Tensor:
        """Denoising loss ``d`` of each sample: mean over all other dims of ``(out - target)^2``.

        Args:
            out: a prediction ``[B, ...]``.

        Returns:
            ``[B]`` in float32 (float64 kept), whatever the dtype of ``out``.

        Raises:
            ValueError: ``out`` has not the shape of ``target``.
        """
        return mean_square(out, self.target)

    def clean(self, out: Tensor) -> Tensor:
        """The clean sample ``[B, ...]`` that a prediction amounts to, in full precision.

        Raises:
            ValueError: ``out`` has not the shape of ``xt``.
        """
        return self.process.x0(self.xt, out, self.level)

    def snapshot(self, name: Literal["ref", "old", "kl_ref"]) -> Tensor:
        """The prediction of a snapshot that the algorithm has declared.

        Raises:
            ValueError: it was not evaluated.
        """
        prediction = {"ref": self.ref, "old": self.old, "kl_ref": self.kl_ref}[name]
        if prediction is None:
            raise ValueError(
                f"the points hold no {name!r} prediction: evaluate what Algorithm.snapshots "
                "(ref, old) and Algorithm.kl_guidance (kl_ref) declare"
            )
        return prediction
