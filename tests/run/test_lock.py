"""One process at a time has a run folder."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import dgpo.run.lock
from dgpo.errors import UserError
from dgpo.run.lock import FILE, STALE, RunLock

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def other() -> Iterator[psutil.Process]:
    """A process that is alive, and not this one."""
    with subprocess.Popen(SLEEP) as process:
        yield psutil.Process(process.pid)
        process.kill()


def written(folder: Path, age: float = 0.0, **facts: Any) -> Path:
    """A lock that another process has left."""
    folder.mkdir(exist_ok=True)
    file = folder / FILE
    time_ = "2026-01-02T03:04:05+00:00"
    held = {"host": socket.gethostname(), "pid": 1, "started": 0.0, "time": time_, **facts}
    file.write_text(json.dumps(held))
    then = time.time() - age
    os.utime(file, (then, then))
    return file


def test_it_names_its_process_and_is_gone_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    with RunLock(folder) as lock:
        held = json.loads((folder / FILE).read_text())
        assert (held["host"], held["pid"]) == (socket.gethostname(), os.getpid())
        lock.take()  # it has it already
    assert list(tmp_path.iterdir()) == []  # nor is the folder left that was made for it
    folder.mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), RunLock(folder):
        raise ZeroDivisionError
    assert list(folder.iterdir()) == []
    with RunLock(folder, writes=False):
        assert list(folder.iterdir()) == []


def test_a_process_that_lives_is_named(tmp_path: Path, other: psutil.Process) -> None:
    file = written(tmp_path, age=10 * STALE, pid=other.pid, started=other.create_time())
    before = file.read_text()
    words = rf"process {other.pid} on {socket.gethostname()} holds this run since 2026-01-02"
    with pytest.raises(UserError, match=words) as refused:
        RunLock(tmp_path).take()
    assert f"(kill {other.pid})" in str(refused.value)
    assert file.read_text() == before and list(tmp_path.iterdir()) == [file]


def test_a_process_that_is_gone_is_followed(tmp_path: Path, other: psutil.Process) -> None:
    started = other.create_time()
    for facts in (
        {"pid": other.pid, "started": started - 3600},  # its number was given to another
        {"pid": 2**22 + 1, "started": started},
        {"pid": os.getpid(), "started": 0.0},  # a trainer of this process that was not closed
    ):
        written(tmp_path, **facts)
        with RunLock(tmp_path):
            assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
        assert list(tmp_path.iterdir()) == []
    with subprocess.Popen(SLEEP) as killed:
        written(tmp_path, pid=killed.pid, started=psutil.Process(killed.pid).create_time())
        killed.kill()
        while psutil.Process(killed.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        RunLock(tmp_path).take()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"host": "elsewhere"}', None])
def test_of_another_host_the_age_decides(content: str | None, tmp_path: Path) -> None:
    def leave(age: float) -> None:
        file = written(tmp_path, host="elsewhere", pid=os.getpid())
        if content is not None:
            file.write_text(content)
        then = time.time() - age
        os.utime(file, (then, then))

    leave(STALE - 60)
    with pytest.raises(UserError, match=r"holds this run") as refused:
        RunLock(tmp_path).take()
    told = str(refused.value)
    assert f"delete {tmp_path / FILE}" in told and f"after {STALE:.0f} s the folder is free" in told
    assert content is not None or f"process {os.getpid()} on elsewhere" in told
    leave(STALE + 60)
    RunLock(tmp_path).take()


def test_it_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dgpo.run.lock, "BEAT", 0.01)
    with RunLock(tmp_path):
        file = tmp_path / FILE
        os.utime(file, (1.0, 1.0))
        until = time.monotonic() + 30
        while file.stat().st_mtime < 2.0 and time.monotonic() < until:
            time.sleep(0.01)
        assert file.stat().st_mtime > time.time() - 60


def test_another_lock_of_this_process_is_not_released(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    second.take()
    first.release()
    assert (tmp_path / FILE).exists()
    second.release()
    assert not (tmp_path / FILE).exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (
        tmp_path / "file" / "run",
        Path("/proc/none/run"),
        tmp_path / "new" / ("x" * 300),
    ):
        with pytest.raises(UserError, match=r"run\.dir = .* cannot be made or written in"):
            RunLock(folder).take()
    with pytest.raises(UserError, match=r"run\.dir = "):
        RunLock(tmp_path / "a\0b").take()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


TAKES = """
import sys
from pathlib import Path
from dgpo.errors import UserError
from dgpo.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
try:
    lock.take()
    print("has it", flush=True)
except UserError as error:
    print(error, flush=True)
sys.stdin.readline()
"""


def test_of_several_that_start_at_once_one_has_it(tmp_path: Path) -> None:
    written(tmp_path, pid=2**22 + 1)
    command = [sys.executable, "-c", TAKES, str(tmp_path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **pipes) for _ in range(4)]
    try:
        for process in started:
            assert process.stdout.readline() == "ready\n"  # pyright: ignore
        for process in started:
            process.stdin.write("go\n")  # pyright: ignore
            process.stdin.flush()  # pyright: ignore
        said = [process.stdout.readline() for process in started]  # pyright: ignore
    finally:
        for process in started:
            process.communicate("end\n")
    (place,) = [n for n, line in enumerate(said) if line == "has it\n"]
    holder = f"process {started[place].pid} on"
    # one that looked while the lock was being written was not told whose it is
    others = [line for line in said if line != "has it\n"]
    assert all(holder in line or "does not name" in line for line in others), said


def test_it_ends_with_the_object_that_has_it(tmp_path: Path) -> None:
    class Has:
        def __init__(self) -> None:
            lock = RunLock(tmp_path)
            weakref.finalize(self, lock.release)
            lock.take()

    Has()
    gc.collect()
    assert list(tmp_path.iterdir()) == []
