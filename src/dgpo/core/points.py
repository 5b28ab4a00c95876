"""Points are all that a loss sees of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dgpo.core.groups import Groups
from dgpo.core.precision import mean_square
from dgpo.core.process import Level, Process
from dgpo.core.sde import Moments, Sde


@dataclass(frozen=True, eq=False)
class Forward:
    """``Forward`` holds clean samples, noised again to one level, and the predictions there.

    Args:
        x0, noise, xt, target: ``[B, ...]`` in the denoiser's own input space, full precision.
        level: the noise level that all samples share.
        process: how ``xt`` was made of ``x0`` and ``noise``.
        pred: the policy's prediction, ``[B, ...]``; gradients flow through it alone.
        ref: the frozen reference's prediction, without guidance; None if not declared.
        old: the old policy's prediction; None if not declared.
        kl_ref: the reference's prediction with guidance; None if not declared.
        advantages: ``[B]``.
        groups: the group of each sample.
        weights: detached group weights ``[B]`` from a pass over whole groups; a micro-batch that
            holds parts of groups needs them.

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
        _one_shape(self, "pred", ("x0", "noise", "xt", "target", "ref", "old", "kl_ref"))
        _one_number_a_sample(self, ("advantages", "weights"))

    def error(self, out: Tensor) -> Tensor:
        """Return each sample's denoising loss ``d``, the mean of ``(out - target)^2``.

        Args:
            out: a prediction ``[B, ...]``.

        Returns:
            ``[B]`` in float32 (float64 stays), whatever the dtype of ``out``.

        Raises:
            ValueError: ``out`` has not the shape of ``target``.
        """
        return mean_square(out, self.target)

    def clean(self, out: Tensor) -> Tensor:
        """Return the clean sample ``[B, ...]`` that a prediction amounts to, in full precision.

        Raises:
            ValueError: ``out`` has not the shape of ``xt``.
        """
        return self.process.x0(self.xt, out, self.level)

    def snapshot(self, name: Literal["ref", "old", "kl_ref"]) -> Tensor:
        """Return the prediction of a snapshot that the algorithm declares.

        Raises:
            ValueError: the points do not hold this prediction.
        """
        prediction = {"ref": self.ref, "old": self.old, "kl_ref": self.kl_ref}[name]
        if prediction is None:
            raise ValueError(
                f"the points hold no {name!r} prediction: evaluate what Algorithm.snapshots "
                "(ref, old) and Algorithm.kl_guidance (kl_ref) declare"
            )
        return prediction


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A ``Trajectory`` holds one step of the rollouts and the predictions where it began.

    All three predictions have the guidance of the rollout.

    Args:
        xt: ``[B, ...]``, where the step began, as the denoiser saw it.
        xnext: ``[B, ...]``, where the step ended, as the sampler returned it (in its dtype).
        level, next_level: the noise levels of the two, shared by all samples.
        process: says what a prediction means.
        sde: the sampler.
        pred: the policy's prediction at ``xt``; gradients flow through it alone.
        old: the prediction that made the step, recorded in the rollout.
        ref: the frozen reference's prediction; None if not declared.
        advantages: ``[B]``.
        groups: the group of each sample.

    Raises:
        ValueError: two shapes do not fit together.
    """

    xt: Tensor
    xnext: Tensor
    level: Level
    next_level: Level
    process: Process
    sde: Sde
    pred: Tensor
    old: Tensor
    ref: Tensor | None
    advantages: Tensor
    groups: Groups

    def __post_init__(self) -> None:
        _one_shape(self, "pred", ("xt", "xnext", "old", "ref"))
        _one_number_a_sample(self, ("advantages",))

    @property
    def duration(self) -> float:
        """Return how much noise the step takes away: ``s - s'``, the papers' ``-dt``."""
        return self.level.sigma - self.next_level.sigma

    def moments(self, out: Tensor) -> Moments:
        """Return the mean and deviation of the step that a prediction ``[B, ...]`` leads to."""
        return self.sde.moments(self.process, self.xt, out, self.level, self.next_level)

    def log_prob(self, moments: Moments) -> Tensor:
        """Return the log-density ``[B]`` of the step that was taken, the mean over dimensions."""
        return self.sde.log_prob(self.xnext, moments)

    def reference(self) -> Tensor:
        """Return the reference's prediction.

        Raises:
            ValueError: the points do not hold it.
        """
        if self.ref is None:
            raise ValueError(
                "the points hold no 'ref' prediction: evaluate what "
                "TrajectoryAlgorithm.snapshots declares"
            )
        return self.ref


def _one_shape(points: Forward | Trajectory, like: str, names: Sequence[str]) -> None:
    wanted = getattr(points, like).shape
    for name in names:
        value = getattr(points, name)
        if value is not None and value.shape != wanted:
            shapes = f"{tuple(value.shape)} and {tuple(wanted)}"
            raise ValueError(f"{name} and {like} must have one shape, got {shapes}")


def _one_number_a_sample(points: Forward | Trajectory, names: Sequence[str]) -> None:
    batch = points.pred.shape[:1]
    vectors = {name: getattr(points, name) for name in names}
    for name, value in {**vectors, "groups": points.groups.index}.items():
        if value is not None and value.shape != batch:
            got = f"{tuple(batch)}, got {tuple(value.shape)}"
            raise ValueError(f"{name} must be one number a sample, shape {got}")
