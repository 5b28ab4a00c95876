"""Ctrl-C and SIGTERM are handled so that they do no harm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

_STOPS = (signal.SIGINT, signal.SIGTERM)
TWICE = 5.0
"""For so many seconds a second SIGTERM counts as a copy of the first."""


class Terminated(BaseException):
    """The process got a SIGTERM, which a cluster sends before it takes a machine away.

    It is no ``SystemExit``, because a reward that calls ``sys.exit`` has failed, and this is not a
    failure.
    """


class RaiseTerminated:
    """This signal handler raises :class:`Terminated`.

    Clusters and launchers both pass a SIGTERM on, so a process may get it twice. A second one that
    comes within :data:`TWICE` is ignored, so that it does not interrupt the cleaning up.
    """

    def __init__(self) -> None:
        self.raised = float("-inf")

    def __call__(self, number: int, frame: Any) -> None:
        if monotonic() - self.raised < TWICE:
            return
        self.raised = monotonic()
        raise Terminated


def hear_again() -> None:
    """Raise :class:`Terminated` again if a SIGTERM came and the program has gone on all the same.

    Python only prints an exception that is raised in a ``__del__`` or in a callback of the garbage
    collector. Call this function where no stop is under way.

    Raises:
        Terminated: a SIGTERM has come before.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, RaiseTerminated) and handler.raised > float("-inf"):
        raise Terminated


@contextmanager
def terminable() -> Iterator[None]:
    """Raise a SIGTERM that comes during the block as :class:`Terminated`; then exit with code 0.

    A handler that the program has set itself stays in place. Outside the main thread, which alone
    receives signals, the block runs unchanged.

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
    """Hold back a Ctrl-C or SIGTERM until the block is done, or until the block calls the function
    that it is given.

    A second Ctrl-C is raised at once, unless the program has a handler of its own. Outside the main
    thread, which alone receives signals, the block runs unchanged.
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
    # raised only now, so that the handlers of before are in place and nothing is left half done
    if heard:
        signal.raise_signal(heard[0])
