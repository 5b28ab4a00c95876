"""What crosses between the host and the device goes without a wait, or all at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def sent(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x`` on the device of ``like``.

    An ordinary copy to a GPU ends by waiting for all that the GPU has yet to do. One from pinned
    memory takes its place in the queue.
    """
    if like.is_cuda and not x.is_cuda:
        return x.pin_memory().to(like.device, non_blocking=True)
    return x.to(like.device)


def taken(x: Tensor, rows: Tensor) -> Tensor:
    """Return ``x[rows]``, wherever the two are; ``rows`` are whole numbers ``[n]``."""
    return x[sent(rows, x)]


def read(numbers: Iterable[Any], like: Tensor) -> list[float]:
    """Return numbers as Python has them, with a single wait for the device.

    >>> read([torch.tensor(0.5), torch.tensor(2.0), 1], like=torch.tensor(0.0))
    [0.5, 2.0, 1.0]

    Args:
        numbers: tensors of one element, or plain numbers.
        like: a tensor on the device where most of them are.
    """
    held = [sent(torch.as_tensor(number).detach().reshape(()), like) for number in numbers]
    # of several kinds of floats torch takes the widest, so that none is rounded
    return torch.stack(held).tolist() if held else []
