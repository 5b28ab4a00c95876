"""Calls that may raise, hang or answer nonsense: a time limit, further tries, one clear error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from typing import TypeVar

import torch

from dgpo.errors import UserError, message, told
from dgpo.rewards.reward import RewardFailure
from dgpo.rewards.settings import RewardSettings
from dgpo.user_code import user_code

T = TypeVar("T")
MAX_HANGING = 8
"""How many calls of one reward may hang at the same time before it is called no more."""


class Again(Exception):
    """A try that failed; the next one may not.

    Args:
        reason: what happened.
        gone: no answer came at all, so asking about other pictures is no use either.
    """

    def __init__(self, reason: str, gone: bool = False) -> None:
        super().__init__(reason)
        self.gone = gone


def persist(call: Callable[[], T], retries: int, pause: float) -> T:
    """The answer of ``call``, which is tried again while it raises :class:`Again`.

    Args:
        call: what is tried.
        retries: how many more times.
        pause: seconds before the first further try; each next one waits twice as long.

    Raises:
        Again: the last try's.
    """
    for tried in range(retries):
        try:
            return call()
        except Again:
            time.sleep(pause * 2**tried)
    return call()


class CallLimits:
    """Calls one reward as its settings ask.

    A call that is too late cannot be ended: its thread is left behind, and its answer is not used.
    """

    def __init__(self, name: str, settings: RewardSettings) -> None:
        self._name, self._settings = name, settings
        self._skips = settings.on_error == "skip_group"
        self._hanging: list[Future] = []

    def __call__(self, call: Callable[[], T]) -> T:
        """The answer of ``call``.

        Raises:
            RewardFailure: every try raised or was too late. A ``UserError`` of the reward's own
                says what to do and is not tried again; nor is a failure that lets the run go on.
        """
        retries = self._settings.retries
        try:
            return persist(lambda: self._tried(call), retries, self._settings.pause)
        except Again as error:
            tries = f" (tried {retries + 1} times)" if retries else ""
            raise RewardFailure(f"{error}{tries}", error.gone, self._skips) from error

    def _tried(self, call: Callable[[], T]) -> T:
        try:
            with user_code(f"reward {self._name!r}"):  # around a call that is given up, too
                return self._in_time(call)
        except RewardFailure as error:
            if error.skips:
                raise
            raise Again(str(error), error.gone) from error
        except UserError as error:
            raise RewardFailure(message(error), skips=self._skips) from error
        except (Exception, SystemExit) as error:
            raise Again(f"reward {self._name!r} raised {told(error)}") from error

    def _in_time(self, call: Callable[[], T]) -> T:
        limit = self._settings.timeout
        if limit is None:
            return call()
        self._hanging = [future for future in self._hanging if not future.done()]
        if len(self._hanging) >= MAX_HANGING:
            raise RewardFailure(f"reward {self._name!r}: {MAX_HANGING} calls hang", gone=True)
        future = in_thread(call)
        try:
            return future.result(limit)
        except Late:
            if future.done():
                raise  # the reward's own
        finally:  # an interrupt leaves a call behind as well
            if not future.done():
                self._hanging.append(future)
        raise RewardFailure(
            f"reward {self._name!r}: no answer within {limit:g} s; raise its timeout, or see why "
            "it hangs",
            gone=True,
        )


def in_thread(call: Callable[[], T], name: str = "reward") -> Future[T]:
    """Run ``call`` in a thread that does not keep the program from ending, on the caller's GPU and
    stream."""
    future: Future[T] = Future()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if stream is not None:
                torch.cuda.set_device(stream.device)  # each thread has its own
            with torch.cuda.stream(stream):
                future.set_result(call())
        except BaseException as error:  # whoever waits for the future raises it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=name).start()
    return future
