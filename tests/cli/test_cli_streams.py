"""What was paid for is saved before anything is printed; and no text is too odd for a stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

SMILE = "\U0001f600"
ODD = f"a {SMILE} caf\u00e9"
ESCAPED = r"a \U0001f600 caf\xe9"
OWN = f"""
from dgpo.evaluation.benchmarks import Benchmark
def rows():
    return [dict(prompt={ODD!r}, tag={ODD!r}, seed=seed) for seed in (1, 2)]
def reward(images, prompts):
    return [1.0] * len(images)
reward.__name__ = {ODD!r}
TINY = Benchmark({ODD!r}, "own:rows", ("brightness",), steps=2)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text(f"{ODD}\n{ODD} 2\n", encoding="utf-8")
    for folder, name in (
        ("few", os.fsencode(f"{ODD}.png")),
        ("few", b"\xff.png"),
        ("one", b"b.png"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        with open(os.fsencode(tmp_path / folder) + b"/" + name, "wb") as file:
            Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return tmp_path


SCORE = ["score", "--reward", "redness", "--images", "few", "--prompts", "prompts.txt"]
MODEL = ["--model", "pocket"]
SMALL = ["group_size=2", "groups_per_iteration=1", "rewards={brightness: 1.0}"]
SMALL += ["prompts.train=prompts.txt", "train.iterations=1", "eval.limit=2", "samples.count=0"]
COMMANDS: dict[str, tuple[list[str], str]] = {
    "score": ([*SCORE, "--json", "out.jsonl"], "out.jsonl"),
    "eval": (["eval", *MODEL, "--benchmark", "own:TINY", "--json", "out.json"], "out.json"),
    "sample": (
        ["sample", *MODEL, "--steps", "2", "--prompt", ODD, "--out", ODD],
        f"{ODD}/00000.png",
    ),
    "collect": (
        ["collect", "pocket-geneval", *SMALL, "--groups", "1", "--out", ODD],
        f"{ODD}/groups.jsonl",
    ),
}
"""Commands that do work, and the file that they make."""
EACH = [
    name if name == "score" else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS
]


def dgpo(*arguments: str, **changes: Any) -> subprocess.CompletedProcess[bytes]:
    """``dgpo ARGUMENTS`` in a process of its own, whose streams hold ASCII alone."""
    path = os.pathsep.join(path for path in sys.path if path)
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": path, "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "dgpo", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **changes}
    return subprocess.run(command, env=env, timeout=300, check=False, **streams)


@pytest.mark.parametrize("name", EACH)
def test_odd_letters_on_an_ascii_stream(here: Path, name: str) -> None:
    command, file = COMMANDS[name]
    done = dgpo(*command)
    printed, warned = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    assert done.returncode == 0, warned
    assert "Traceback" not in warned and (here / file).stat().st_size > 0
    assert ESCAPED in printed


def test_scores_of_odd_names_can_be_read_again(here: Path) -> None:
    done = dgpo(*COMMANDS["score"][0])
    assert done.returncode == 0, done.stderr
    lines = (here / "out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prompt"] for row in rows] == [ODD, f"{ODD} 2"]
    assert {os.fsencode(row["image"]) for row in rows} == {
        os.fsencode(f"few/{ODD}.png"),
        b"few/\xff.png",
    }


@pytest.mark.parametrize("name", EACH)
def test_what_was_paid_for_is_there_though_nobody_reads(here: Path, name: str) -> None:
    command, file = COMMANDS[name]
    reads, writes = os.pipe()
    os.close(reads)
    done = dgpo(*command, stdout=writes)
    os.close(writes)
    told = done.stderr.decode("ascii")
    assert (here / file).stat().st_size > 0
    assert "Traceback" not in told and "BrokenPipe" not in told and "Exception ignored" not in told
    assert done.returncode == 1


def test_an_error_that_quotes_odd_letters(here: Path) -> None:
    done = dgpo(*SCORE[:-1], f"{ODD}.txt")
    assert done.returncode == 2 and ESCAPED in done.stderr.decode("ascii")


def test_a_reader_that_leaves_early_hears_no_complaint(here: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m dgpo list | head -n 1",
        shell=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        check=True,
    )
    assert done.stdout.count(b"\n") == 1 and done.stderr == b""
