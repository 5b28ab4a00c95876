"""What an optimiser step is made of, whatever the algorithm trains on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from dgpo.core.points import Forward, Trajectory


class MicroLoss(NamedTuple):
    """The loss of one micro-batch at one noise level."""

    loss: Tensor
    """0-dim, with its graph."""
    figures: dict[str, Tensor]
    """0-dim, detached."""
    share: float
    """What the figures count in the mean over the iteration."""
    weight: float
    """What the loss counts in the optimiser step: the weights of a round add up to the share of
    its pictures that are trained."""
    last: bool = False
    """True if the optimiser step comes next."""


def idle(points: Forward | Trajectory | None, last: bool) -> MicroLoss:
    """A loss that trains nothing: its passes are made because other processes make theirs, or it
    has none (``points`` is None) and only keeps the place. Every process has equally many losses,
    so that all can be stopped at the same one."""
    loss = torch.zeros(()) if points is None else points.pred.sum() * 0
    return MicroLoss(loss, {}, 0.0, 0.0, last)


Round: TypeAlias = Iterator[MicroLoss]
"""The losses of one optimiser step, each made when it is asked for, after the backward pass of the
one before."""
