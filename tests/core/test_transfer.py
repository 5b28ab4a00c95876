"""Numbers cross between host and device unchanged; test_waits.py counts the waits."""

from __future__ import annotations

import torch

from dgpo.core.transfer import read, sent, taken


def test_numbers_are_read_as_they_are() -> None:
    third = torch.tensor(1 / 3, dtype=torch.float64)
    numbers = [torch.tensor([0.1]), third, torch.tensor(0.1, dtype=torch.bfloat16), True, 7, 0.1]
    found = read(numbers, like=torch.tensor(0.0))
    assert found == [float(torch.as_tensor(number)) for number in numbers]
    assert read([], like=third) == []


def test_a_graph_is_not_kept() -> None:
    loss = torch.ones(2, requires_grad=True).sum()
    assert read([loss], like=loss) == [2.0]


def test_rows_are_taken_where_the_tensor_is() -> None:
    x, rows = torch.arange(6.0).reshape(3, 2), torch.tensor([2, 0])
    assert sent(x, rows) is x
    assert torch.equal(taken(x, rows), x[rows])
