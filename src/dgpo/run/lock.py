"""One process at a time has a run folder: a file in it names that process.

The file is made by ``O_EXCL``, which holds on network file systems too, and is touched every
:data:`BEAT` seconds. On the same host a process is known to be gone by its pid and start time; of
another host only the age of the file tells.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import uuid
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import psutil

from dgpo.disk import DAMAGED
from dgpo.errors import UserError

FILE = "lock.json"
BEAT = 30.0
"""Seconds between two signs of life."""
STALE = 300.0
"""The seconds without a sign of life after which another host's lock counts as left over."""
_SAME_START = 60.0
"""The seconds by which two readings of a start time may differ when the clock was set."""


class RunLock:
    """A ``RunLock`` is the right of one process to write a run folder; it is a context manager.

    A lock of a process that is gone is taken over, and so is one of this process, which cannot
    train twice at once.

    Args:
        folder: the run folder, which is made if there is none.
        writes: whether this process writes the folder; in others the lock does nothing.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self._file, self._writes = folder / FILE, writes
        self._mine = ""
        self._made: list[Path] = []
        self._ended = threading.Event()

    def take(self) -> None:
        """Take the folder, unless this lock has it already.

        Raises:
            UserError: another process has it, or the folder cannot be made or written in.
        """
        if self._mine or not self._writes:
            return
        folder, me = self._file.parent, psutil.Process()
        facts = {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time()}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        mine = json.dumps({**facts, "time": now, "id": uuid.uuid4().hex}) + "\n"
        try:
            self._made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            while not self._created(mine):
                self._clear()
        except (OSError, ValueError) as error:  # ValueError: no folder can have this name
            self._remove_made()
            raise UserError(
                f"run.dir = {str(folder)!r:.400}: this folder cannot be made or written in "
                f"({error}); choose another: run.dir=FOLDER"
            ) from error
        self._mine, self._ended = mine, threading.Event()
        beat = (self._file, self._ended)
        threading.Thread(target=_beat, args=beat, name="dgpo-lock", daemon=True).start()

    def release(self) -> None:
        """Give the folder back. A folder that was made for the lock and is empty is removed."""
        mine, self._mine = self._mine, ""
        # a forked process has the object, but not the lock
        if not mine or json.loads(mine)["pid"] != os.getpid():
            return
        self._ended.set()
        with suppress(OSError):
            if self._file.read_text(encoding="utf-8") == mine:
                self._file.unlink()
        self._remove_made()

    def __enter__(self) -> RunLock:
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _created(self, mine: str) -> bool:
        try:
            handle = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(handle, mine.encode())
            os.fsync(handle)
        except OSError:
            self._file.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        return True

    def _clear(self) -> None:
        """Remove a lock that was left over.

        Raises:
            UserError: its process may be alive.
        """
        with tempfile.TemporaryFile(dir=self._file.parent) as probe:
            now = os.fstat(probe.fileno()).st_mtime  # by the clock that dates the lock
        aside = self._file.with_name(f"{FILE}.{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):  # it was released meanwhile
            with self._file.open(encoding="utf-8", errors="replace") as stream:
                held, age = stream.read(), now - os.fstat(stream.fileno()).st_mtime
            self._refuse_living(held, age)
            self._file.rename(aside)
            # another start may have been quicker, and what was moved away be its lock
            quicker = aside.read_text(encoding="utf-8", errors="replace") != held
            aside.rename(self._file) if quicker else aside.unlink()

    def _refuse_living(self, held: str, age: float) -> None:
        who = f"a process that {self._file} does not name"
        since, lives = "", age < STALE
        way = (
            f". If it is gone: its last sign of life was {max(age, 0):.0f} s ago; after "
            f"{STALE:.0f} s the folder is free, or at once if you delete {self._file}"
        )
        try:
            holder = json.loads(held)
            who = f"process {holder['pid']} on {holder['host']}"
            since = f" since {holder['time']}"
            if holder["host"] == socket.gethostname():
                lives = _lives(holder["pid"], holder["started"])
                way = f" (kill {holder['pid']})"
        except DAMAGED:
            pass  # it was cut off while it was written, and its age decides
        if lives:
            raise UserError(
                f"run.dir = {str(self._file.parent)!r}: {who} holds this run{since}. Wait until it "
                f"has ended, or stop it{way}"
            )

    def _remove_made(self) -> None:
        for folder in self._made:
            with suppress(OSError, ValueError):  # what has anything in it stays
                folder.rmdir()
        self._made = []


def _lives(pid: int, started: float) -> bool:
    """Return whether that very process runs, and is not this one."""
    if pid == os.getpid():
        return False
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < _SAME_START
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True  # somebody else's, and there


def _beat(file: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(file)
