"""The number of processes changes no update, whatever the algorithm."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest

from dgpo.registry import ALGORITHMS
from distributed.together import (
    all_well,
    alone,
    apart,
    check_figures,
    train,
    train_and_note,
    train_losing,
    weights,
)
from tiny_runs import rows

FAST = ("dgpo", "flow_grpo")
EACH, WHOLE = "distributed.together:noted", "distributed.together:of_all"


def same_update(
    folder: Path, name: str, sizes: tuple[int, ...], changes: dict[str, Any] | None = None
) -> None:
    alone(train, folder / "1", folder / "1", name, changes)
    here = weights(folder / "1")
    moved = [here[n] - here[n.replace("policy", "slow")] for n in here if n.startswith("policy.")]
    assert max(float(tensor.abs().max()) for tensor in moved) > 1e-4
    for size in sizes:
        several = folder / str(size)
        all_well(size, train, several, several, name, changes)
        off = apart(folder / "1", several)
        print(f"{name}, {size} processes: {off:.1e}")  # docs/scaling.md quotes it
        assert off < 1e-6
        check_figures(folder / "1", several, 1e-6)


@pytest.mark.parametrize("name", FAST)
def test_two_processes_are_one(name: str, tmp_path: Path) -> None:
    """Fifteen pictures, or two parts of five, in groups of five: no process has whole groups."""
    same_update(tmp_path, name, (2,))


def test_two_processes_are_one_with_a_lora_and_inner_epochs(tmp_path: Path) -> None:
    changes = {"lora": {"rank": 4, "alpha": 8}, "train": {"inner_epochs": 2}}
    same_update(tmp_path, "dgpo", (2,), changes)


def test_what_one_process_loses_all_lose(tmp_path: Path) -> None:
    """Lost pictures take their groups out of the update, and are no part of a score."""
    one, two = tmp_path / "1", tmp_path / "2"
    alone(train_losing, one, one)
    all_well(2, train_losing, two, two)
    assert apart(one, two) < 1e-6
    check_figures(one, two, 1e-6)
    lost = sum(row.get("samples_lost", 0) for row in rows(one))
    skipped = sum(row.get("groups_skipped", 0) for row in rows(one))
    assert 0 < skipped <= lost < 30 and skipped < 6
    scores = [
        [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
        for folder in (one, two)
    ]
    for here, there in zip(*scores, strict=True):
        assert (here["lost"], here["n"]) == (there["lost"], there["n"])
        assert here["overall"] == pytest.approx(there["overall"], rel=1e-9)
    assert any(report["lost"] for report in scores[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_and_four_processes_are_one(name: str, tmp_path: Path) -> None:
    same_update(tmp_path, name, (2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_a_run_goes_on_with_another_number(name: str, tmp_path: Path) -> None:
    through, changed = tmp_path / "through", tmp_path / "changed"
    long: dict[str, Any] = {"train": {"iterations": 4}}
    alone(train, through, through, name, long)
    all_well(2, train, changed, changed, name)
    all_well(4, train, changed, changed, name, {**long, "resume": True})
    assert apart(through, changed) < 1e-6
    check_figures(through, changed, 1e-6)


@pytest.mark.slow
def test_what_was_sampled_ahead_goes_on_with_another_number(tmp_path: Path) -> None:
    through, changed = tmp_path / "through", tmp_path / "changed"
    changes: dict[str, Any] = {
        "train": {"iterations": 4},
        "rollout": {"batch": 2, "ahead": 1},
        "checkpoint": {"every": 2},
    }
    alone(train, through, through, "dgpo", changes)
    all_well(2, train, changed, changed, "dgpo", changes)
    rmtree(changed / "checkpoints" / "00000004")
    assert (changed / "checkpoints" / "00000002" / "ahead.safetensors").exists()
    all_well(3, train, changed, changed, "dgpo", {**changes, "resume": True})
    assert apart(through, changed) < 1e-6
    check_figures(through, changed, 1e-6)


def test_each_held_out_prompt_counts_once(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "eval_dataset": [f"{n} red dog" for n in range(5)],
        "eval": {"at_start": True, "every": 0, "batch": 2, "metrics": [EACH, WHOLE]},
        "train": {"iterations": 1},
    }

    def scored(size: int) -> list[str]:
        run, notes = tmp_path / str(size), tmp_path / f"scored-{size}.txt"
        all_well(size, train_and_note, run, run, str(notes), changes)
        return sorted(notes.read_text().splitlines())

    one, two = scored(1), scored(2)
    # two evaluations of five prompts; every process tries the reward with the first and the last
    assert len(one) == 12 and two == sorted([*one, "0 red dog", "4 red dog"])
    for a, b in zip(*(rows(tmp_path / n, "evaluations.jsonl") for n in "12"), strict=True):
        assert a["n"] == b["n"] == 5 and b["overall"] == pytest.approx(a["overall"], abs=1e-6)
        assert b["ci95"] == pytest.approx(a["ci95"], abs=1e-6)
        assert b["rewards"][WHOLE] == pytest.approx(a["rewards"][WHOLE], abs=1e-6)
        assert b["intervals"][WHOLE] == a["intervals"][WHOLE] == [5, 5]
