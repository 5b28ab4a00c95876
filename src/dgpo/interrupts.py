"""Ctrl-C and SIGTERM where they can do no harm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

_STOPS = (signal.SIGINT, signal.SIGTERM)
TWICE = 5.0
"""Seconds in which a second SIGTERM is taken for the first."""


class Terminated(BaseException):
    """SIGTERM, as a cluster sends before it takes a machine away. No ``SystemExit``: a reward that
    calls ``sys.exit`` is a reward that failed, and this is not."""


class RaiseTerminated:
    """A handler that raises :class:`Terminated`.

    Clusters and launchers both pass a SIGTERM on, so that a process gets it twice: one that comes
    soon after the first does not interrupt what the first has begun to undo.
    """

    def __init__(self) -> None:
        self.raised = float("-inf")

    def __call__(self, number: int, frame: Any) -> None:
        if monotonic() - self.raised < TWICE:
            return
        self.raised = monotonic()
        raise Terminated


def hear_again() -> None:
    """Raise what a SIGTERM has raised where nothing can be raised: Python prints it and goes on
    after a ``__del__``, or what the garbage collector calls.

    To be called where no stop is under way.

    Raises:
        Terminated: the run has gone on after one.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, RaiseTerminated) and handler.raised > float("-inf"):
        raise Terminated


@contextmanager
def terminable() -> Iterator[None]:
    """A SIGTERM during the block is raised in it as :class:`Terminated`, and then ends the process
    with code 0.

    A handler that the program has set itself is left alone, and so is everything outside the main
    thread, which alone hears of signals.

    Raises:
        SystemExit: with code 0, after a SIGTERM.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    signal.signal(signal.SIGTERM, RaiseTerminated())
    try:
        yield
    except Terminated:
        raise SystemExit(0) from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def all_or_nothing() -> Iterator[Callable[[], None]]:
    """A Ctrl-C or SIGTERM during the block is heard once the block is done, or where the block
    calls what it is given.

    A second Ctrl-C is raised at once, unless the program has a handler of its own for them. Outside
    the main thread, which alone hears of signals, the block runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    heard: list[int] = []
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in _STOPS}

    def wait(number: int, frame: Any) -> None:
        usual = before[signal.SIGINT] is signal.default_int_handler
        if number == signal.SIGINT and number in heard and usual:
            raise KeyboardInterrupt
        heard.append(number)

    def hear() -> None:
        for number in tuple(heard):
            handler = before[signal.Signals(number)]
            if callable(handler):
                heard.remove(number)
                handler(number, None)

    for number in _STOPS:
        signal.signal(number, wait)
    try:
        yield hear
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: set by C code
    if heard:
        signal.raise_signal(heard[0])
