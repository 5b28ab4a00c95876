"""The examples run as they are, in a small size."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"


def run(name: str, out: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[dict]:
    monkeypatch.setattr("sys.argv", [name, "--out", str(out), *words])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_own_reward(tmp_path, monkeypatch, capsys) -> None:
    rows = run("own_reward.py", tmp_path / "red", monkeypatch, "--iterations", "1", "--groups", "1")
    assert [row["iteration"] for row in rows] == [1]
    assert rows[0]["spread"] > 0
    assert "pictures in" in capsys.readouterr().out
    assert (tmp_path / "red/lora/pytorch_lora_weights.safetensors").is_file()


def test_offline(tmp_path, monkeypatch) -> None:
    rows = run(
        "offline.py", tmp_path / "run", monkeypatch, "--groups", "2", "--iterations", "1",
        "--limit", "2",
    )  # fmt: skip
    assert rows[0]["reward_mean"] == pytest.approx(0.5)
    assert rows[0]["images"] == 0  # nothing was sampled to train on


def test_all_examples_are_run_here() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    for file in FOLDER.glob("*.py"):
        assert f'"{file.name}"' in here
