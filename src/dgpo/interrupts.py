"""Ctrl-C where it can do no harm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """A Ctrl-C during the block is raised as ``KeyboardInterrupt`` once the block is done.

    A second one is raised at once. Outside the main thread, which alone hears of Ctrl-C, the block
    runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = False

    def wait(number: int, frame: Any) -> None:
        nonlocal heard
        if heard:
            raise KeyboardInterrupt
        heard = True

    before = signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt
