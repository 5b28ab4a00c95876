"""What is changed for the time of a block, and back after it, whatever cuts the block off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dgpo.interrupts import all_or_nothing

_changed: list[Callable[[], None]] = []
"""What puts back what is changed now, the newest last."""


@contextmanager
def put_back(restore: Callable[[], None]) -> Iterator[None]:
    """``restore`` is called once after the block, or by :func:`bring_back`, and as a whole: a stop
    halfway would save the weights of two models as one.

    Args:
        restore: brings back what the block changes; nothing is lost by it where it has not yet.
    """
    _changed.append(restore)
    try:
        yield
    finally:
        with all_or_nothing():
            if restore in _changed:
                restore()
                _changed.remove(restore)


def bring_back() -> None:
    """Put back what blocks have changed that were cut off between their last line and their end.

    A signal may be heard there too, and what the block would have undone is then left to whenever
    its frame is forgotten, which is after a stop has saved the weights.
    """
    while _changed:
        _changed[-1]()
        _changed.pop()
