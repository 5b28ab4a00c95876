"""Ctrl-C and SIGTERM in several processes: all stop at the same place, or none does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgpo.disk import says_disk_full
from dgpo.distributed.processes import Processes
from dgpo.interrupts import RaiseTerminated, terminable


@contextmanager
def deferred(processes: Processes) -> Iterator[None]:
    """Inside the block a signal waits until :meth:`Processes.stop_if_asked`.

    Launchers send a signal to every process, at slightly different times, and twice if it came
    from a terminal. A process that stopped at once would leave the others waiting in a collective
    operation. Nothing changes for a single process, outside the main thread, and where the program
    has handlers of its own.
    """
    if processes.single or threading.current_thread() is not threading.main_thread():
        yield
        return

    def keep(number: int, frame: Any) -> None:
        processes.heard = number  # raised where all processes ask, and nowhere in between

    own = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # handlers of the program itself stay: it has its own way to stop
    before = {
        number: signal.signal(number, keep)
        for number, handler in own.items()
        if handler is signal.default_int_handler or isinstance(handler, RaiseTerminated)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def unharmed(processes: Processes, folder: Path) -> Iterator[None]:
    """Inside the block nothing that ends a run leaves others waiting or a file half written.

    An exception ends all processes, signals are heard where they do no harm, and a full disk is
    told as such.

    Args:
        processes: the processes of the run.
        folder: where it writes.
    """
    with processes.ending_together(), terminable(), deferred(processes), says_disk_full(folder):
        yield
