"""Stopping and going on: nothing may show that a run was stopped."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dgpo.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from dgpo.errors import UserError
from dgpo.interrupts import all_or_nothing
from dgpo.rewards.stand_in import brightness
from tiny_runs import PROMPTS, TIMESTEPS, Spy, light, rows, trainer, without_times


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


RUN: dict[str, Any] = {
    "eval_dataset": PROMPTS[:2],
    "eval": {"at_start": True, "every": 2},
    "ema": {"decay": 0.5, "every": 3},
}
TRAIN = {"iterations": 4, "lr": 1e-2, "lr_schedule": "cosine", "warmup": 2}
MODES = {
    "lora": {"train": {**TRAIN, "optimizer_step": "timestep"}},
    "full": {"lora": None, "train": {**TRAIN, "lr": 1e-3}},
}


def algorithm() -> Spy:
    return Spy(timesteps=TIMESTEPS)  # pyright: ignore[reportArgumentType]


def assert_equal_runs(one: Path, two: Path) -> None:
    assert without_times(one) == without_times(two)
    assert [row["iteration"] for row in rows(two)] == [1, 2, 3, 4]
    file = "evaluations.jsonl"
    assert without_times(one, file) == without_times(two, file)
    assert [row["iteration"] for row in rows(two, file)] == [0, 2, 4]
    tensors = [load_file(run / "checkpoints/last/tensors.safetensors") for run in (one, two)]
    assert set(tensors[0]) == set(tensors[1])
    assert any(name.startswith("optimizer.0.exp_avg") for name in tensors[0])
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name


@pytest.mark.parametrize("mode", MODES)
def test_a_stopped_run_becomes_the_run_that_was_not(mode: str, tmp_path: Path) -> None:
    given = {**RUN, **MODES[mode]}
    trainer(tmp_path / "through", algorithm=algorithm(), **given).train()
    stopped = tmp_path / "stopped"

    # first in the middle of an evaluation, the one after the second iteration
    calls = itertools.count()

    def interrupted(images: Any, prompts: Any) -> list[float]:
        if next(calls) == 5:  # two of the trial, the first evaluation, two rollouts, and now
            raise KeyboardInterrupt
        return brightness(images, prompts)

    interrupted.__name__ = "brightness"
    with pytest.raises(KeyboardInterrupt):
        trainer(stopped, interrupted, algorithm=algorithm(), **given).train()
    assert [row["iteration"] for row in rows(stopped, "evaluations.jsonl")] == [0]

    # then by a real Ctrl-C in the middle of an update, which is done before it is heard
    run = trainer(stopped, algorithm=algorithm(), resume=True, **given)
    assert run.iteration == 2
    Spy.on_loss[:] = [_once(lambda: signal.raise_signal(signal.SIGINT))]
    try:
        with pytest.raises(KeyboardInterrupt):
            run.train()
    finally:
        Spy.on_loss.clear()
    assert run.iteration == 3

    trainer(stopped, algorithm=algorithm(), resume=True, **given).train()
    assert_equal_runs(tmp_path / "through", stopped)


def _once(action: Any) -> Any:
    left = [action]
    return lambda: left.pop()() if left else None


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, capsys: Any) -> None:
    run = trainer(tmp_path, algorithm=algorithm(), checkpoint={"every": 1})
    calls = itertools.count()

    def twice() -> None:
        if next(calls) == 2:  # in the second iteration
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    Spy.on_loss[:] = [twice]
    try:
        with pytest.raises(KeyboardInterrupt):
            run.train()
    finally:
        Spy.on_loss.clear()
    assert "in the middle of an update" in capsys.readouterr().err
    resumed = trainer(tmp_path, algorithm=algorithm(), resume=True)
    assert resumed.iteration == 1 and resumed.updater.step == 1


def test_a_block_is_whole_before_ctrl_c_is_heard() -> None:
    before = signal.getsignal(signal.SIGINT)
    done = []
    with pytest.raises(KeyboardInterrupt), all_or_nothing():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done and signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError, match="inner"), all_or_nothing():
        raise ValueError("inner")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_checkpoint_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path / "run")
    place = tmp_path / "checkpoints" / "last"
    save_checkpoint(place, run.policy, run.updater, {"iteration": 1})
    weight = run.policy.parameters()[0]
    first = weight.detach().clone()

    def crash(*args: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("dgpo.checkpoint.save_file", crash)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(place, run.policy, run.updater, {"iteration": 2})
    weight.data.zero_()
    assert load_checkpoint(place, run.policy, run.updater)["iteration"] == 1
    assert torch.equal(weight, first)

    place.rename(place.with_name("last.old"))  # as a crash between the two renames leaves it
    assert find_checkpoint(place).name == "last.old"
    save_checkpoint(place, run.policy, run.updater, {"iteration": 3})
    assert sorted(p.name for p in place.parent.iterdir()) == ["last"]
    assert load_checkpoint(place, run.policy, run.updater)["iteration"] == 3

    other = trainer(tmp_path / "other", lora={"rank": 2, "alpha": 2})
    with pytest.raises(UserError, match="does not fit this policy"):
        load_checkpoint(place, other.policy, other.updater)
    with pytest.raises(UserError, match="holds no checkpoint to go on from"):
        find_checkpoint(tmp_path / "nothing")
