"""`dgpo rank` that is killed again and again: what was acknowledged is kept and not asked about."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dgpo.preferences import read_groups
from dgpo.ranking.store import Store
from ranking.scripted import Rater, free_port

GROUPS = 6


def begun(folder: Path, port: int) -> subprocess.Popen[str]:
    command = ["dgpo", "rank", "pocket-human", "group_size=3", "rollout.steps=5"]
    command += ["rollout.guidance_scale=1", "--groups", str(GROUPS), "--out", str(folder)]
    path = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-m", *command, "--port", str(port)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def killing(child: subprocess.Popen[str], at: int) -> Callable[[int], Any]:
    """Kill after ``at`` answers, while the next is on its way."""

    def leave(answers: int) -> bool:
        if answers == at:
            threading.Timer(0.003, child.kill).start()
        return False

    return leave


@pytest.mark.slow
def test_no_kill_loses_a_ranking(tmp_path: Path) -> None:
    acknowledged: list[str] = []
    for at in (0, 1, 2):
        port = free_port()
        child = begun(tmp_path, port)
        with Rater(port, killing(child, at)) as rater:
            assert child.wait(120) == -9, child.stdout and child.stdout.read()
        assert len(rater.answers) >= at
        acknowledged += rater.answers
        store = Store(tmp_path)
        for group in store.groups():
            assert group.id not in rater.answers or list(store.answers(group)) == ["script"]
            for file in group.files:
                Image.open(tmp_path / file).load()
        store.close()
    port = free_port()
    child = begun(tmp_path, port)
    with Rater(port) as rater:
        printed = child.communicate(timeout=240)[0]
    assert child.returncode == 0 and f"{GROUPS} ranked groups" in printed, printed
    answers = acknowledged + rater.answers
    assert len(set(answers)) == len(answers), "somebody was asked twice"
    store = Store(tmp_path)
    assert set(answers) <= {group.id for group in store.groups()}
    assert store.counts() == {"script": GROUPS}
    store.close()
    groups = read_groups(tmp_path)
    assert len(groups) == GROUPS and all(max(group.rewards) == 1 for group in groups)
