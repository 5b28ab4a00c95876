"""One process that fails, hangs or is stopped, and what becomes of the others."""

from __future__ import annotations

import json
import re
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dgpo.distributed.processes import current_processes
from dgpo.distributed.watch import HANG
from dgpo.recipe.sections import GuardSettings
from dgpo.rewards.shipped.stand_in import brightness
from dgpo.training.checkpoint_files import find_checkpoint
from distributed import together
from distributed.together import Ended, world

SOON = 15.0
"""Seconds from the exception of one process to the end of all."""


def check_all_ended(ended: Ended) -> None:
    """None was killed for being late, and none believes that it is done."""
    assert not {0, None, -signal.SIGKILL} & set(ended.codes), ended


def test_a_reward_that_raises_in_one_ends_all(tmp_path: Path) -> None:
    ended = world(2, together.train_with, tmp_path, tmp_path, together.raises, {})
    check_all_ended(ended)
    for told in ended.errors:  # the one that failed, and the first, at which one looks
        assert "no such judge" in told and "LookupError" in told
    assert "process 1 of 2" in ended.errors[0] and "Connection" not in ended.errors[0]
    raised = re.search(r"^raised at ([\d.]+)$", ended.errors[1], re.MULTILINE)
    assert raised is not None
    took = ended.gone - float(raised[1])
    print(f"all had ended {took:.1f} s after the exception")  # docs/scaling.md quotes it
    assert took < SOON


def test_a_callback_that_raises_in_one_ends_all_with_its_name(tmp_path: Path) -> None:
    ended = world(2, together.train_with_callback, tmp_path, tmp_path, "raise")
    check_all_ended(ended)
    for told in ended.errors:
        assert "callback OneOf.on_iteration_end raised LookupError: no such shelf" in told


@pytest.mark.parametrize(
    ("what", "history"),
    [
        ("should_stop", [[False, 1], [True, 1]]),
        ("should_evaluate", [[False, 1], [True, 1], [False, 2], [False, 3], [True, 3]]),
    ],
)
def test_what_one_process_asks_for_all_do(what: str, history: Any, tmp_path: Path) -> None:
    together.all_well(2, together.train_with_callback, tmp_path, tmp_path, what)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"history-{rank}.json").read_text()) == history


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_one_that_is_killed_is_named(rank: int, tmp_path: Path) -> None:
    """It cannot tell; without a launcher the first takes the store with it."""
    ended = world(2, together.train_one_killed, tmp_path, tmp_path, rank)
    assert ended.codes[rank] == -signal.SIGKILL and ended.codes[1 - rank] not in (0, None, -9)
    told = " ".join(ended.errors[1 - rank].split())
    who = "process 0, or the launcher" if rank == 0 else "process 1 of 2 (pid"
    assert (who in told and "--resume" in told) or "that started the run is gone" in told
    killed = re.search(r"^killed at ([\d.]+)$", ended.errors[rank], re.MULTILINE)
    assert killed is not None
    took = ended.gone - float(killed[1])
    print(f"all had ended {took:.1f} s after the kill")  # docs/scaling.md quotes it
    assert took < 2 * SOON


@pytest.mark.slow
def test_one_that_hangs_in_an_evaluation_is_named(tmp_path: Path) -> None:
    assert 60 * GuardSettings().hang_minutes == HANG
    ended = world(2, together.evaluate_hanging, tmp_path, tmp_path)
    check_all_ended(ended)
    told = ended.errors[0]
    assert "process 1 of 2" in told and "time.sleep(40_000)" in told


def test_a_backend_gives_up_after_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Connects(Exception):
        pass

    def connect(backend: str, timeout: timedelta) -> None:
        assert timeout > timedelta(minutes=GuardSettings().hang_minutes)
        raise Connects

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr("torch.distributed.init_process_group", connect)
    with pytest.raises(Connects):
        current_processes()


def test_one_that_does_not_come_is_named_with_its_place(tmp_path: Path) -> None:
    ended = world(2, together.sleep_in_one, tmp_path, tmp_path)
    check_all_ended(ended)
    told = ended.errors[0]
    assert "for the second meeting" in told and "process 1 of 2" in told
    assert "took part last in: the first meeting" in told and "time.sleep(10_000)" in told


@pytest.mark.slow
def test_a_reward_that_hangs_in_one_is_named(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"guards": {"hang_minutes": 0.5}}
    ended = world(2, together.train_with, tmp_path, tmp_path, together.hangs, changes)
    check_all_ended(ended)
    told = ended.errors[0]
    assert "guards.hang_minutes" in told and "process 1 of 2" in told
    assert "time.sleep(20_000)" in told and "the rewards of all pictures" in told


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_one_that_hangs_in_a_pass_of_sharded_weights_is_named(where: str, tmp_path: Path) -> None:
    ended = world(2, together.hang_in_pieces, tmp_path, tmp_path, where)
    check_all_ended(ended)
    told = ended.errors[0]
    assert "for the" in told and "pass of transformer" in told and "process 1 of 2" in told
    assert "time.sleep(30_000)" in told and "in pieces (train.sharding)" in told


def test_sigterm_to_one_saves_and_ends_all(tmp_path: Path) -> None:
    changes = {"train": {"iterations": 50}}
    ended = world(2, together.train_with, tmp_path, tmp_path, together.terminates, changes)
    assert ended.codes == [0, 0], "\n".join(ended.errors)
    assert find_checkpoint(tmp_path / "checkpoints").iteration < 50


UPDATES: dict[str, tuple[str, dict[str, Any], int]] = {
    # algorithm, settings, and the training pass of process 1 in which it is asked to stop;
    # 15 pictures: process 1 has 7 of them, and process 0 one micro-batch more
    "before the step": ("dgpo", {"train": {"micro_batch": 7}}, 2 + 1),
    # 5 pictures for each of two updates: process 1 has 2 of them; two steps of the sampler
    "between two updates": ("flow_grpo", {"lora": {"rank": 4}, "train": {"micro_batch": 2}}, 4 + 3),
    # a group for each process, which leaves its own passes out
    "on its own": ("dgpo", {"groups_per_iteration": 2}, 6 + 2),
    # all make as many passes
    "in pieces": ("dgpo", {"train": {"micro_batch": 7, "sharding": "fsdp2"}}, 4 + 2),
}


@pytest.mark.parametrize(
    "kind",
    [
        k if k in ("before the step", "on its own") else pytest.param(k, marks=pytest.mark.slow)
        for k in UPDATES
    ],
)
def test_sigterm_to_one_within_an_update_stops_all_there(kind: str, tmp_path: Path) -> None:
    name, changes, number = UPDATES[kind]
    changes = {"reward": brightness, **changes}
    alone = {**changes, "train": {**changes.get("train", {}), "sharding": "none"}}
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    together.alone(together.train, through, through, name, alone)
    ended = world(2, together.train_until, stopped, stopped, name, number, changes)
    assert ended.codes == [0, 0], "\n".join(ended.errors)
    assert find_checkpoint(stopped / "checkpoints").iteration == 1
    together.all_well(2, together.train, stopped, stopped, name, {**changes, "resume": True})
    assert together.apart(through, stopped) < 1e-5  # a step moves a weight by 1e-3


def test_other_recipes_are_refused(tmp_path: Path) -> None:
    ended = world(2, together.train_unlike, tmp_path, tmp_path)
    check_all_ended(ended)
    assert "process 1 of 2 was given another recipe than process 0" in "".join(ended.errors)


@pytest.mark.parametrize("key", ["train", "eval"])
def test_other_rows_are_refused(key: str, tmp_path: Path) -> None:
    ended = world(2, together.train_on_other_rows, tmp_path, tmp_path / "run", f"{key}_dataset")
    words = f"process 1 of 2 was given another set of prompts (prompts.{key}) than process 0"
    assert 0 not in ended.codes and all(words in told for told in ended.errors)
    assert not (tmp_path / "run").exists()
