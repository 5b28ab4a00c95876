"""When one process ends, all end; and a process that hangs is called by its name.

A process that waits in a collective operation cannot be reached. It would wait for a process that
has died or hangs for as long as the backend allows. So a second thread of each process looks into
the store by which the processes found each other.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

import torch.distributed as dist

from dgpo.errors import UserError

LOOK_EVERY = 0.5
"""Seconds between two looks into the store."""
PATIENCE = 10.0
"""Seconds that a process waits for an answer from the others, at most, before it ends."""
ANSWER = 5.0
"""Seconds within which the second thread of a living process answers."""
GOODBYE = 60.0
"""Seconds that the first process waits for the others to finish."""
HANG = 1800.0
"""Seconds that one process may keep the others waiting if no recipe says otherwise: the default of
``guards.hang_minutes``."""
_FAILED = "failed"


class Watch:
    """A ``Watch`` looks after the other processes of a run.

    Args:
        store: through which all processes talk.
        rank: the number of this process.
        size: how many there are.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.hang_seconds: float | None = HANG
        """How long one process may keep the others waiting; None for ever."""
        self._store = store
        self._main = threading.main_thread()
        self._met = self._passed = 0
        self._what = "nothing yet"
        self._since: float | None = None
        self._stopped = threading.Event()
        self._lost: float | None = None
        self._told = False
        self._gone = 0
        """How many processes are known to be gone."""
        self.name = f"process {rank} of {size} (pid {os.getpid()} on {socket.gethostname()})"
        store.set(f"name/{rank}", self.name)
        threading.Thread(target=self._look, daemon=True, name="dgpo-watch").start()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """In the block this process meets the others in a collective operation."""
        # the clock stands while the place is written: the other thread reads all four
        self._since, self._what = None, what
        self._met, self._passed = self._met + 1, 0
        self._store.set(f"at/{self.rank}", self._told_place())
        self._since = monotonic()
        try:
            yield
        except RuntimeError as error:
            self._explain(error)
            raise
        finally:
            self._since = None

    def passes(self, what: str) -> None:
        """Note a place where this process may have to wait for the others outside :meth:`waiting`.

        All processes come by these places in the same order. Noting one costs nothing: the second
        thread writes it into the store.
        """
        self._passed, self._what = self._passed + 1, what
        self._since = monotonic()

    def fail(self, error: BaseException) -> None:
        """Tell all processes why this one ends, and give them time to end first."""
        user = isinstance(error, UserError)
        told = str(error) if user else "".join(traceback.format_exception(error))
        self._accuse(f"{self.name} failed, which ends all:\n{told}")

    def stop(self) -> bool:
        """Stop looking, because the run is over. Returns whether all went well.

        The first process, which may keep the store, waits until the others are done with it.
        """
        self._stopped.set()
        if self._told:
            return False
        try:
            self._store.add("left", 1)
            began = monotonic()
            while self.rank == 0 and self._store.add("left", 0) < self.size:
                if self._failure() is not None or monotonic() - began > GOODBYE:
                    return False
                sleep(0.05)
        except RuntimeError:
            return False
        return True

    def _explain(self, error: RuntimeError) -> None:
        """Find out why a connection is closed.

        A process that has failed says why, and this one then ends too. A process that was killed
        cannot say anything.

        Raises:
            UserError: processes are gone without a word.
        """
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            for rank in others:
                self._store.set(f"asked/{rank}", "1")
            # the failure may be written a moment after the connection is closed
            if self._failure(ANSWER) is not None:
                self._end()
            gone = [rank for rank in others if not self._store.check([f"stack/{rank}"])]
            names = [f"{self._ask(f'name/{n}')} (last in: {self._place(n)[1]})" for n in gone]
            self._gone = len(gone)
        except RuntimeError:
            names = ["process 0, or the launcher"]  # which keeps the store
        if names:
            raise UserError(
                f"{self.name} waited for {self._what}; gone without a word: {', '.join(names)}. "
                "It was killed (by a cluster, or for its memory), it crashed, or its machine "
                f"cannot be reached ({error}). Go on from the last checkpoint with --resume"
            ) from error

    def _accuse(self, text: str) -> None:
        """Write down the failure of this process; if another failed first, end for that one."""
        if self._told:
            return
        mine = json.dumps({"by": self.rank, "text": text})
        self._told = True  # before the other thread can see it
        try:
            # several may fail at once: only the first is told, and the others end for it
            first = self._store.compare_set(_FAILED, "", mine).decode()
            if first != mine:
                self._end()
            # this process may keep the store, in which the others still have to read
            others = self.size - 1 - self._gone
            _wait(lambda: self._store.add("ended", 0) >= others, PATIENCE)
        except RuntimeError:
            pass  # the store is gone, and the other processes with it

    def _told_place(self) -> str:
        return json.dumps([self._met, self._passed, self._what])

    def _look(self) -> None:
        told = ""
        while not self._stopped.wait(LOOK_EVERY):
            try:
                if (place := self._told_place()) != told:
                    self._store.set(f"at/{self.rank}", place)
                    told = place
                # the main thread may hang in a collective operation, so this one ends the process
                if not self._told and self._failure() is not None:
                    self._end()
                if self._store.check([f"asked/{self.rank}"]):
                    self._store.delete_key(f"asked/{self.rank}")
                    self._store.set(f"stack/{self.rank}", self._stack())
                self._find_missing()
                self._lost = None
            except RuntimeError:
                self._store_is_gone()

    def _find_missing(self) -> None:
        """End all processes if one has kept this one waiting for too long."""
        since, mine = self._since, (self._met, self._passed)
        if since is None or self.hang_seconds is None:
            return
        waited = monotonic() - since
        if waited < self.hang_seconds:
            return
        missing = [rank for rank in range(self.size) if self._place(rank)[0] < mine]
        if not missing or self._since != since:
            return  # all have come, or this process has gone on meanwhile
        what = self._what
        # who is behind is asked where its main thread stands, which often shows the cause
        lines = [f"waited {waited:.0f} s for {what} (guards.hang_minutes of a recipe); missing:"]
        for rank in missing:
            last = self._place(rank)[1]
            lines.append(f"{self._ask(f'name/{rank}')}, which took part last in: {last}")
            lines.append(self._ask(f"stack/{rank}", f"asked/{rank}"))
        self._accuse("\n".join([f"{self.name} {lines[0]}", *lines[1:]]))
        self._end()

    def _place(self, rank: int) -> tuple[tuple[int, int], str]:
        """Return how often a process has met the others and how many places it has passed since;
        and what it did last."""
        if not self._store.check([f"at/{rank}"]):
            return (0, 0), "nothing yet"
        met, passed, what = json.loads(self._store.get(f"at/{rank}"))
        return (met, passed), what

    def _ask(self, key: str, question: str | None = None) -> str:
        if question is not None:
            self._store.set(question, "1")
        if _wait(lambda: self._store.check([key]), PATIENCE):
            return self._store.get(key).decode()
        return "it does not answer: it is stopped, dead, or its machine cannot be reached"

    def _stack(self) -> str:
        """Return the place where the main thread of this process is."""
        frame = sys._current_frames().get(self._main.ident or 0)
        lines = traceback.format_stack(frame) if frame is not None else []
        return "it is here (most recent call last):\n" + "".join(lines)

    def _failure(self, patience: float = 0.0) -> dict[str, Any] | None:
        """Return the failure that a process has written down, if there is one.

        Args:
            patience: seconds to wait for it.
        """
        try:
            if _wait(lambda: self._store.check([_FAILED]), patience):
                return json.loads(self._store.get(_FAILED))
        except RuntimeError:
            if not patience:
                raise
        return None

    def _store_is_gone(self) -> None:
        """End this process a moment after the launcher or the first process has ended."""
        self._lost = self._lost or monotonic()
        if monotonic() - self._lost > PATIENCE and not self._stopped.is_set():
            text = f"{self.name} ends: the process that started the run is gone\n"
            _leave(text)

    def _end(self) -> None:
        """End this process because of the failure that was written down. Does not return."""
        text = None
        try:
            found = self._failure()
            # the first process says it as well: its output is the one that people look at
            if found is not None and self.rank in (0, found["by"]):
                text = found["text"]
            if found is not None and found["by"] != self.rank:
                self._store.add("ended", 1)
        except RuntimeError:
            pass  # nobody is left to be told
        _leave(text)


def _wait(holds: Callable[[], bool], seconds: float) -> bool:
    """Wait until something holds, at most so long; returns whether it does."""
    until = monotonic() + seconds
    while not holds():
        if monotonic() >= until:
            return False
        sleep(0.05)
    return True


def _leave(text: str | None) -> None:
    """End the process at once: its main thread may be in an operation that never returns."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # show the cursor, which a progress bar has hidden
    if text:
        sys.stderr.write(text.rstrip() + "\n")
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)
