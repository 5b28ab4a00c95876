"""Lockstep: where weights lie in pieces, processes with uneven shares make equally many passes.

With ``train.sharding`` no process holds a whole layer. Every forward and every backward pass
gathers the weights from all processes, layer by layer, so every pass is a collective operation. All
processes must therefore make the same number of passes, in the same order: a process that made one
more would wait for the others for ever.

Shares differ by a row or two. A process that has nothing left to do makes a *dummy* pass, with one
row that it has anyway, and throws the result away. Where every process holds all weights, it makes
no pass at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgpo.distributed.processes import Processes


class Turn(NamedTuple):
    """A ``Turn`` is one pass of this process, which all the others make too."""

    rows: Tensor
    """[n], the rows that the pass is made with; none where this process makes no pass."""
    counts: bool
    """True if the result is wanted."""

    @property
    def dummy(self) -> bool:
        """Return whether the pass is made only because other processes make theirs."""
        return len(self.rows) > 0 and not self.counts


def pieces(rows: Tensor, size: int | None, most: int) -> Iterator[Tensor]:
    """Cut rows into pieces, as many in every process: the last ones may be empty.

    >>> [piece.tolist() for piece in pieces(torch.arange(3), size=2, most=5)]
    [[0, 1], [2], []]

    Args:
        rows: [n] of this process.
        size: rows of a piece; None for all of them at once.
        most: rows of the process that has the most.
    """
    size = size or most
    for start in range(0, most, size):
        yield rows[start : start + size]


def turns(parts: Iterable[Tensor], sharded: bool) -> Iterator[Turn]:
    """Yield a turn for each part: a dummy where the part is empty and weights are sharded.

    >>> parts = [torch.tensor([3, 4]), torch.tensor([])]
    >>> [(turn.rows.tolist(), turn.counts) for turn in turns(parts, sharded=True)]
    [([3, 4], True), ([0], False)]

    Args:
        parts: rows of this process, as many parts as in every other process (:func:`pieces`).
        sharded: whether every process must take part in every pass.
    """
    for rows in parts:
        if len(rows) or not sharded:
            yield Turn(rows, len(rows) > 0)
        else:
            yield Turn(torch.arange(1), False)  # the first row: every process has one


def even_turns(parts: Sequence[Tensor], processes: Processes) -> list[Turn]:
    """Return a turn for each part, and dummies until every process has as many. Collective.

    Args:
        parts: rows of this process. The other processes need not have as many parts.
        processes: those over which weights are sharded; a single one where they are not.
    """
    counts = processes.all_gather_object(len(parts), "a pass of sharded weights (train.sharding)")
    own = [Turn(rows, True) for rows in parts]
    return own + [Turn(parts[0], False)] * (max(counts) - len(parts))
