"""Change something for the time of a block and restore it afterwards, whatever cuts it off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dgpo.interrupts import all_or_nothing

_to_restore: list[Callable[[], None]] = []
"""Restores what is changed now, the newest change last."""


@contextmanager
def restoring(restore: Callable[[], None]) -> Iterator[None]:
    """Call ``restore`` once after the block, or in :func:`restore_now`, and always as a whole.

    Args:
        restore: brings back what the block changes. It must be harmless before the change.
    """
    # noted before the block changes anything: a signal may come between any two lines
    _to_restore.append(restore)
    try:
        yield
    finally:
        # a stop halfway would save the weights of two models as one
        with all_or_nothing():
            if restore in _to_restore:
                restore()
                _to_restore.remove(restore)


def restore_now() -> None:
    """Restore what blocks have changed that were cut off between their last line and their end.

    A signal may arrive there too. Python then runs the block's ``finally`` only when it forgets the
    frame, which is after a stop has saved the weights.
    """
    while _to_restore:
        _to_restore[-1]()  # taken off only once it is done: a second signal may cut this off
        _to_restore.pop()
