"""Processes with uneven shares take equally many turns, and only real ones count."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dgpo.distributed.lockstep import Turn, even_turns, pieces, turns
from dgpo.distributed.processes import SINGLE


def listed(found: Any) -> list[tuple[list[int], bool]]:
    return [(turn.rows.tolist(), turn.counts) for turn in found]


@pytest.mark.parametrize("size", [1, 2, 3, 7, None])
@pytest.mark.parametrize("rows", [0, 1, 4, 5])
def test_every_process_has_as_many_pieces(rows: int, size: int | None) -> None:
    most = list(pieces(torch.arange(5), size, 5))
    mine = list(pieces(torch.arange(rows), size, 5))
    assert len(mine) == len(most)
    assert torch.cat(mine).tolist() == list(range(rows))
    assert all(len(piece) <= (size or 5) for piece in mine)


def test_a_dummy_is_made_of_the_first_row_where_weights_are_sharded() -> None:
    parts = [torch.tensor([2, 3]), torch.arange(0)]
    assert listed(turns(parts, sharded=True)) == [([2, 3], True), ([0], False)]
    assert listed(turns(parts, sharded=False)) == [([2, 3], True), ([], False)]


def test_a_turn_is_real_a_dummy_or_nothing() -> None:
    real, dummy = Turn(torch.arange(2), True), Turn(torch.arange(1), False)
    nothing = Turn(torch.arange(0), False)
    assert [turn.dummy for turn in (real, dummy, nothing)] == [False, True, False]


def test_turns_are_made_when_they_are_asked_for() -> None:
    """Between two of them a run may be stopped, and all processes stop at the same one."""
    asked: list[int] = []

    def parts() -> Any:
        for number in range(3):
            asked.append(number)
            yield torch.tensor([number])

    for turn in turns(parts(), sharded=True):
        assert asked == list(range(int(turn.rows) + 1))


class Others:
    """A run whose other processes have so many parts."""

    def __init__(self, *parts: int) -> None:
        self.parts = parts

    def all_gather_object(self, value: int, what: str) -> list[int]:
        assert "sharding" in what
        return [value, *self.parts]


def test_parts_of_any_size_are_evened_by_the_first_part_again() -> None:
    parts = [torch.tensor([0, 2]), torch.tensor([1])]
    real = [([0, 2], True), ([1], True)]
    assert listed(even_turns(parts, SINGLE)) == real
    others: Any = Others(1, 4)
    assert listed(even_turns(parts, others)) == [*real, *[([0, 2], False)] * 2]
    fewer: Any = Others(1)
    assert listed(even_turns(parts, fewer)) == real
