"""What every algorithm decides, and nothing of how a model is run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from dgpo.algorithms.contract import Contract
from dgpo.core.groups import Groups
from dgpo.core.points import Forward, Trajectory
from dgpo.core.sde import AnySde, FlowSDE
from dgpo.core.timesteps import TimestepChoice
from dgpo.core.window import StepWindow
from dgpo.settings import Settings


class BaseAlgorithm(Settings, ABC):
    """What all algorithms decide. They see predictions, never the model: the trainer makes the
    forward passes that they declare, and no others.

    Derive from :class:`Algorithm` to train on clean samples that are noised again, from
    :class:`TrajectoryAlgorithm` to train on the steps of the rollout.
    """

    name: ClassVar[str]
    """The registered name, as in ``algorithm: {name: ...}``."""
    contract: ClassVar[Contract] = Contract()
    """The settings with which the tests of all algorithms try this one."""
    points: ClassVar[Literal["forward", "trajectory"]]
    """Train on clean samples noised again, or on the steps of the rollout."""
    samples_from: ClassVar[Literal["policy", "old"]] = "policy"
    """Whose pictures the mathematics is about; ``rollout.switch_to_old_after`` may ask for the old
    policy's with any algorithm."""

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


class Algorithm(BaseAlgorithm):
    """An algorithm on clean samples that are noised again: its settings and decisions."""

    points: ClassVar[Literal["forward", "trajectory"]] = "forward"
    old_moves: ClassVar[Literal["step", "iteration"]] = "step"
    """When the old policy moves: after every optimiser step, or once an iteration's update is done,
    so that with a decay of 0 it is the policy that the next iteration's pictures come from."""

    timesteps: TimestepChoice = TimestepChoice()
    """Which noise levels of the rollout's schedule are trained."""
    shared_noise: bool = True
    """One noise for all samples of a group at one level, drawn anew for every level."""

    @property
    @abstractmethod
    def snapshots(self) -> frozenset[Literal["ref", "old"]]:
        """Snapshots whose predictions the loss reads, without guidance."""

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


class TrajectoryAlgorithm(BaseAlgorithm):
    """A policy gradient on the steps of the rollout: its settings and decisions.

    The rollout is made by a stochastic sampler. Of each trained step the loss sees where it began
    and ended, the prediction it was made with, and the policy's now. ``updates`` optimiser steps
    are taken on one iteration's rollouts, so that the policy is that of the rollouts in the first.
    """

    points: ClassVar[Literal["forward", "trajectory"]] = "trajectory"
    sde_kinds: ClassVar[tuple[str, ...]] = ("flow", "dance", "cps")
    """The samplers that the loss is meant for, by ``sde.kind``."""

    sde: AnySde = FlowSDE()
    """The sampler of the rollouts and its noise."""
    window: StepWindow | None = None
    """The steps that add noise and are trained; null: all but the last, which has no density."""
    updates: int = Field(default=2, ge=1)
    """Optimiser steps of an iteration, each on its own equal part of the groups."""

    @model_validator(mode="after")
    def _sampler_of_this_algorithm(self) -> TrajectoryAlgorithm:
        if self.sde.kind not in self.sde_kinds:
            raise ValueError(
                f"algorithm.sde.kind = {self.sde.kind!r}: {self.name} takes "
                f"{', '.join(self.sde_kinds)}"
            )
        return self

    @property
    @abstractmethod
    def snapshots(self) -> frozenset[Literal["ref"]]:
        """Snapshots whose predictions the loss reads, with the guidance of the rollout."""

    def noisy_steps(self, steps: int, iteration: int, seed: int) -> range:
        """The steps of an iteration's rollouts that add noise and are trained.

        Args:
            steps: of the rollout.
            iteration: counted from 0.
            seed: of the run.

        Raises:
            UserError: the rollout has too few steps.
        """
        if self.window is None:
            return range(steps - 1)
        return self.window.place(steps, iteration, seed)

    @abstractmethod
    def loss(self, points: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`Algorithm.loss`: means over the samples given, metrics detached."""
