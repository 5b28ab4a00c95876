"""What every algorithm decides, and nothing of how a model is run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from dgpo.core.groups import Groups
from dgpo.core.points import Forward
from dgpo.core.timesteps import TimestepChoice


class Settings(BaseModel):
    """Frozen settings: an unknown key, an infinite number or a NaN is refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class Algorithm(Settings, ABC):
    """Settings of one algorithm and its decisions.

    It sees predictions, never the model: the trainer makes the forward passes that ``points``,
    ``snapshots`` and ``kl_guidance`` declare, and no others.
    """

    name: ClassVar[str]
    """The registered name, as in ``algorithm: {name: ...}``."""
    points: ClassVar[Literal["forward", "trajectory"]] = "forward"
    """Train on clean samples noised again, or on the steps of the rollout."""
    old_moves: ClassVar[Literal["step", "iteration"]] = "step"
    """When the old policy moves: after every optimiser step, or once an iteration's update is done,
    so that with a decay of 0 it is the policy that the next iteration's pictures come from."""

    samples_from: ClassVar[Literal["policy", "old"]] = "policy"
    """Whose pictures the mathematics is about; ``rollout.switch_to_old_after`` may ask for the old
    policy's with any algorithm."""

    timesteps: TimestepChoice = TimestepChoice()
    """Which noise levels of the rollout's schedule are trained."""
    shared_noise: bool = True
    """One noise for all samples of a group at one level, drawn anew for every level."""

    @property
    @abstractmethod
    def snapshots(self) -> frozenset[Literal["ref", "old"]]:
        """Snapshots whose predictions the loss reads, without guidance."""

    @property
    def kl_guidance(self) -> float | None:
        """Guidance scale of the KL term's reference, if it wants a forward pass of its own
        (``Forward.kl_ref``); else None."""
        return None

    @property
    def trained_per_group(self) -> int | None:
        """How many samples of each group are trained: exactly those whose advantage is not zero.
        None for whole groups. The others cost no forward pass."""
        return None

    @abstractmethod
    def advantages(self, rewards: Tensor, groups: Groups) -> Tensor:
        """Rewards ``[B]`` of whole groups to advantages ``[B]``."""

    def weights(self, points: Forward) -> Tensor | None:
        """Detached group weights ``[B]``, or None if the loss has no statistic over a group.

        Needs whole groups (over all processes). Predictions without gradients will do: for groups
        larger than a micro-batch, one such pass over whole groups gives ``Forward.weights`` for
        every micro-batch.
        """
        return None

    @abstractmethod
    def loss(self, points: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (0-dim) and its metrics (0-dim, detached).

        Both are means over the samples given, so that micro-batches, and processes, averaged with
        their sizes as weights give the gradient of the whole batch.
        """

    @abstractmethod
    def old_decay(self, step: int) -> float:
        """Decay of the old policy's EMA after optimizer step ``step``, counted from 0 (after the
        update of iteration ``step`` if ``old_moves`` says so).

        At 0 the old policy becomes the policy.
        """
