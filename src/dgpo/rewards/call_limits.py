"""Calls that may raise, hang or answer nonsense: a time limit, further tries, one clear error."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from pathlib import Path
from typing import TypeVar

import torch

from dgpo.errors import UserError
from dgpo.rewards.settings import RewardSettings

T = TypeVar("T")
MAX_HANGING = 8
"""Calls of one reward that may hang at the same time before it is called no more."""


class RewardFailure(UserError):
    """A reward gave no usable answer after all tries.

    Args:
        message: which reward, and why.
        gone: it hangs or cannot be reached, so that asking about fewer pictures is no use.
        skips: the run goes on without the groups concerned, as the recipe or the reward says.
    """

    def __init__(self, message: str, gone: bool = False, skips: bool = False) -> None:
        super().__init__(message)
        self.gone = gone
        self.skips = skips


class Guard:
    """Calls one reward as its settings ask.

    A call that is too late cannot be ended: its thread is left behind, and its answer is not used.
    """

    def __init__(self, name: str, term: RewardSettings) -> None:
        self._name, self._term = name, term
        self._hanging: list[Future] = []

    def __call__(self, call: Callable[[], T]) -> T:
        """The answer of ``call``.

        Raises:
            RewardFailure: it raised or was too late at every try, or it raised a ``UserError`` of
                its own, which says what to do and is not tried again; nor is a failure that lets
                the run go on by itself.
        """
        term = self._term
        failure = RewardFailure("")
        for tried in range(term.retries + 1):
            if tried:
                time.sleep(term.pause * 2 ** (tried - 1))
            try:
                return self._in_time(call)
            except RewardFailure as error:
                if error.skips:
                    raise
                failure = error
            except UserError as error:
                raise RewardFailure(str(error), skips=term.on_error == "skip_group") from error
            except (Exception, SystemExit) as error:
                failure = RewardFailure(f"reward {self._name!r} raised {_told(error)}")
                failure.__cause__ = error
        tries = f" (tried {term.retries + 1} times)" if term.retries else ""
        skips = term.on_error == "skip_group"
        raise RewardFailure(f"{failure}{tries}", failure.gone, skips) from failure

    def _in_time(self, call: Callable[[], T]) -> T:
        limit = self._term.timeout
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
        except BaseException:
            if not future.done():
                self._hanging.append(future)
            raise
        self._hanging.append(future)
        raise RewardFailure(
            f"reward {self._name!r}: no answer within {limit:g} s; raise its timeout, or see why "
            "it hangs",
            gone=True,
        )


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Run ``call`` in a thread that does not keep the program from ending."""
    future: Future[T] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # each thread has its own
            future.set_result(call())
        except BaseException as error:  # whoever waits for the future raises it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="reward").start()
    return future


def _told(error: BaseException) -> str:
    """An error and where it came from: the report shows no traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
