"""Ctrl-C and SIGTERM for several processes: all stop at the same place, or none."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dgpo.distributed.processes import Processes
from dgpo.interrupts import RaiseTerminated


@contextmanager
def deferred(processes: Processes) -> Iterator[None]:
    """Inside the block a signal is kept until :meth:`Processes.stop_if_asked`.

    Launchers send a signal to every process, at slightly different times, and twice if it came
    from a terminal. A process that stopped at once would leave the others waiting. For one
    process, in other threads than the main one, and where the program has handlers of its own,
    nothing is changed.
    """
    if processes.single or threading.current_thread() is not threading.main_thread():
        yield
        return

    def hear(number: int, frame: Any) -> None:
        processes.heard = number

    own = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {
        number: signal.signal(number, hear)
        for number, handler in own.items()
        if handler is signal.default_int_handler or isinstance(handler, RaiseTerminated)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
