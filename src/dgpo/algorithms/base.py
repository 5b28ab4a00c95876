"""An algorithm decides what is trained and how; it never sees how a model is run."""

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

SnapshotName = Literal["ref", "old"]
"""Names a fixed or slower copy of the policy: the frozen reference or the old policy."""


class BaseAlgorithm(Settings, ABC):
    """A ``BaseAlgorithm`` makes the decisions that all algorithms make.

    An algorithm sees predictions, never the model: the trainer makes the forward passes that the
    algorithm declares, and no others.

    Derive from :class:`Algorithm` to train on clean samples that are noised again, or from
    :class:`TrajectoryAlgorithm` to train on the steps of the rollout.
    """

    name: ClassVar[str]
    """The registered name, as in ``algorithm: {name: ...}``."""
    contract: ClassVar[Contract] = Contract()
    """The settings with which the tests of all algorithms try this one."""
    points: ClassVar[Literal["forward", "trajectory"]]
    """What is trained: clean samples that are noised again, or the steps of the rollout."""
    samples_from: ClassVar[Literal["policy", "old"]] = "policy"
    """Which model makes the pictures that the mathematics is about. With any algorithm
    ``rollout.switch_to_old_after`` may ask for pictures of the old policy."""

    @property
    def snapshots(self) -> frozenset[SnapshotName]:
        """Name the snapshots whose predictions the loss reads; by default none.

        The predictions have no guidance for an :class:`Algorithm`, and the guidance of the rollout
        for a :class:`TrajectoryAlgorithm`, which may name ``"ref"`` alone.
        """
        return frozenset()

    @property
    def kl_guidance(self) -> float | None:
        """Return the guidance scale of ``Forward.kl_ref`` if the loss reads it, else None.

        The reference then makes a forward pass with guidance.
        """
        return None

    @property
    def trains_equal_groups(self) -> bool:
        """Return whether groups whose rewards are all equal are trained too; by default not.

        Their advantages are 0, so only a loss that reads more than advantages has a use for them.
        """
        return False

    @property
    def trained_per_group(self) -> int | None:
        """Return how many samples of each group are trained; None means all of them.

        They must be exactly those whose advantage is not zero. The others cost no forward pass.
        """
        return None

    @abstractmethod
    def advantages(self, rewards: Tensor, groups: Groups) -> Tensor:
        """Turn the rewards ``[B]`` of whole groups into advantages ``[B]``."""


class Algorithm(BaseAlgorithm):
    """An ``Algorithm`` trains on clean samples that are noised again.

    A new one needs ``name``, ``advantages`` and ``loss``; everything else has a default.
    """

    points: ClassVar[Literal["forward", "trajectory"]] = "forward"
    old_moves: ClassVar[Literal["step", "iteration"]] = "step"
    """When the old policy moves: after every optimiser step, or once the update of an iteration is
    done. Then, with a decay of 0, it is the policy that makes the next iteration's pictures."""

    timesteps: TimestepChoice = TimestepChoice()
    """Which noise levels of the rollout's schedule are trained."""
    shared_noise: bool = True
    """All samples of a group share one noise at a level; each level draws its own."""

    def weights(self, points: Forward) -> Tensor | None:
        """Return detached group weights ``[B]``; None means that the loss needs no whole groups.

        This needs whole groups (over all processes), but no gradients: where a group is larger than
        a micro-batch, one such pass over whole groups gives ``Forward.weights`` for every
        micro-batch.
        """
        return None

    @abstractmethod
    def loss(self, points: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (0-dim) and its metrics (0-dim, detached).

        Both are means over the samples given: micro-batches and processes, averaged with their
        sizes as weights, then give the gradient of the whole batch.
        """

    def old_decay(self, step: int) -> float:
        """Return the decay of the old policy's EMA; at 0, the default, it becomes the policy.

        Args:
            step: the optimiser step that was just taken, or the iteration that was just trained if
                ``old_moves`` is ``"iteration"``; counted from 0.
        """
        return 0.0


class TrajectoryAlgorithm(BaseAlgorithm):
    """A ``TrajectoryAlgorithm`` is a policy gradient on the steps of the rollout.

    A stochastic sampler makes the rollout. For each trained step the loss sees where it began and
    ended, the prediction that made it, and the policy's prediction now. One iteration's rollouts
    serve ``updates`` optimiser steps; at the first the policy is still the one that made them.
    """

    points: ClassVar[Literal["forward", "trajectory"]] = "trajectory"
    sde_kinds: ClassVar[tuple[str, ...]] = ("flow", "dance", "cps")
    """The kinds of samplers (``sde.kind``) that the loss is meant for."""

    sde: AnySde = FlowSDE()
    """The sampler of the rollouts and its noise."""
    window: StepWindow | None = None
    """The steps that add noise and are trained; null: all but the last, which has no density."""
    updates: int = Field(default=2, ge=1)
    """How many optimiser steps an iteration takes, each on its own equal part of the groups."""

    @model_validator(mode="after")
    def _sampler_of_this_algorithm(self) -> TrajectoryAlgorithm:
        if self.sde.kind not in self.sde_kinds:
            raise ValueError(
                f"algorithm.sde.kind = {self.sde.kind!r}: {self.name} takes "
                f"{', '.join(self.sde_kinds)}"
            )
        return self

    def noisy_steps(self, steps: int, iteration: int, seed: int) -> range:
        """Return the steps of an iteration's rollouts that add noise and are trained.

        Args:
            steps: how many steps the rollout has.
            iteration: counted from 0.
            seed: the run's seed.

        Raises:
            UserError: the rollout has too few steps.
        """
        if self.window is None:
            return range(steps - 1)
        return self.window.place(steps, iteration, seed)

    @abstractmethod
    def loss(self, points: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its detached metrics, as :meth:`Algorithm.loss` does."""
