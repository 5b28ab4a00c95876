"""Kill -9 in the middle of an update, for every algorithm: nothing may show that it happened."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from dgpo.registry import ALGORITHMS
from dgpo.training.checkpoint_files import find_checkpoint
from reliable import assert_same, live, processes
from tiny_runs import rows

HALF = 2
TRAINED: dict[str, dict[str, Any]] = {"lora": {}, "all": {"lora": None, "train": {"lr": 1e-3}}}
FAST = ("dgpo", "lora")


def end_of(
    folder: Path, name: str, trained: str, resume: bool = False, kill_in: int | None = None
) -> int:
    """The exit code of a process that trains."""
    train = {"iterations": 2 * HALF, "lr": 1e-2, "lr_schedule": "cosine", "warmup": 2}
    own = TRAINED[trained]
    changes = {**own, "train": {**train, **own.get("train", {})}, "checkpoint": {"every": HALF}}
    output = folder.with_suffix(".txt")
    given = (str(folder), str(output), name, resume, kill_in, changes)
    process = processes().Process(target=live, args=given)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), output.read_text()
    return process.exitcode


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        pytest.param(n, t, marks=() if (n, t) == FAST else pytest.mark.slow)
        for n in ALGORITHMS
        for t in TRAINED
    ],
)
def test_killed_in_an_update(name: str, trained: str, tmp_path: Path) -> None:
    through, killed = tmp_path / "through", tmp_path / "killed"
    assert end_of(through, name, trained) == 0
    assert end_of(killed, name, trained, kill_in=HALF) == -signal.SIGKILL
    assert len(rows(killed)) == find_checkpoint(killed / "checkpoints").iteration == HALF
    assert end_of(killed, name, trained, resume=True) == 0
    assert [row["iteration"] for row in rows(killed)] == [1, 2, 3, 4]
    assert_same(through, killed)
