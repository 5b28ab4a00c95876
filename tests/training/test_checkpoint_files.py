"""Stopping and going on: nothing may show that a run was stopped."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError

import dgpo.training.checkpoint_files
from dgpo.disk import replace_text, says_disk_full
from dgpo.errors import UserError
from dgpo.interrupts import all_or_nothing
from dgpo.rewards.shipped.stand_in import brightness
from dgpo.training.checkpoint_files import find_checkpoint, load_checkpoint, prune, save_checkpoint
from reliable import assert_same, stopping
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
    assert [row["iteration"] for row in rows(two)] == [1, 2, 3, 4]
    file = "evaluations.jsonl"
    assert without_times(one, file) == without_times(two, file)
    assert [row["iteration"] for row in rows(two, file)] == [0, 2, 4]
    assert_same(one, two)


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

    # then by a real Ctrl-C in the middle of an update, which is dropped
    run = trainer(stopped, algorithm=algorithm(), resume=True, **given)
    assert run.iteration == 2
    Spy.on_loss[:] = [_once(lambda: signal.raise_signal(signal.SIGINT))]
    try:
        with pytest.raises(KeyboardInterrupt):
            run.train()
    finally:
        Spy.on_loss.clear()
    assert run.iteration == 2

    trainer(stopped, algorithm=algorithm(), resume=True, **given).train()
    assert_equal_runs(tmp_path / "through", stopped)


def _once(action: Any) -> Any:
    left = [action]
    return lambda: left.pop()() if left else None


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, capsys: Any) -> None:
    run = trainer(tmp_path, algorithm=algorithm(), checkpoint={"every": 1})
    right, calls = run.updater.optimizer.step, itertools.count(1)

    def twice(*args: Any, **kwargs: Any) -> Any:
        done = right(*args, **kwargs)
        if next(calls) == 2:  # the weights have moved, their averages have not
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return done

    run.updater.optimizer.step = twice
    with pytest.raises(KeyboardInterrupt):
        run.train()
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
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with (
            all_or_nothing()
        ):  # launchers send it twice: who has a handler is asked, not interrupted
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert not heard
        assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ValueError, match="inner"), all_or_nothing():
        raise ValueError("inner")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_checkpoint_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path / "run")
    folder = tmp_path / "checkpoints"

    def save(iteration: int, score: float | None = None) -> Path:
        counters = {"iteration": iteration}
        return save_checkpoint(folder, run.updater, counters, score=score)

    def names() -> list[str]:
        return sorted(place.name for place in folder.iterdir())

    first = save(1)
    weight = run.policy.parameters()[0]
    kept = weight.detach().clone()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files = "training.checkpoint_files"
    for name in (f"{files}.save_file", f"{files}._write_json", "disk.sync"):
        with monkeypatch.context() as patch:
            patch.setattr(f"dgpo.{name}", full)
            with pytest.raises(OSError, match="No space"):
                save(2)
        assert names() == ["00000001"]
    weight.data.zero_()
    assert load_checkpoint(first, run.updater)["iteration"] == 1
    assert torch.equal(weight, kept)

    first.rename(folder / "00000001.old")  # as a kill between the two renames leaves it
    assert find_checkpoint(folder).folder.name == "00000001.old"
    (folder / "00000003.new").mkdir()  # as a kill while it is written leaves it
    assert find_checkpoint(folder).iteration == 1
    save(1)
    assert names() == ["00000001"]

    for iteration, score in ((2, 0.5), (3, 0.9), (4, 0.9), (5, None), (6, 0.1)):
        save(iteration, score)
    assert find_checkpoint(folder).iteration == 6
    assert find_checkpoint(folder, best=True).iteration == 3  # of equal ones the earlier
    prune(folder, keep_last=2, keep_best=1)
    assert names() == ["00000003", "00000005", "00000006"]
    (folder / "00000005.old" / "left").mkdir(parents=True)  # as a kill while it is deleted
    prune(folder, keep_last=1, keep_best=0)
    assert names() == ["00000006"]
    again = save(2)  # by a run that went back
    prune(folder, keep_last=1, keep_best=0, saved=again)
    assert names() == ["00000002", "00000006"]
    rmtree(again)

    other = trainer(tmp_path / "other", lora={"rank": 2, "alpha": 2})
    with pytest.raises(UserError, match="does not fit this policy"):
        load_checkpoint(folder / "00000006", other.updater)
    with pytest.raises(UserError, match="holds no checkpoint to go on from"):
        find_checkpoint(tmp_path / "nothing")


def test_a_run_killed_before_its_first_checkpoint_was_whole_begins_again(
    tmp_path: Path, capsys: Any
) -> None:
    trainer(tmp_path / "through").train()
    killed = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        trainer(killed, stopping(1, Mock(side_effect=KeyboardInterrupt))).train()
    # as a kill leaves it in the middle of the writing of a first checkpoint
    (only,) = (killed / "checkpoints").iterdir()
    half = only.rename(only.with_name(f"{only.name}.new"))
    (half / "manifest.json").unlink()
    _cut(half / "tensors.safetensors")

    # with the model that follows each checkpoint there was one: nothing is begun anew over it
    with pytest.raises(UserError, match=r"holds no checkpoint.*another run.dir"):
        trainer(killed, resume=True)
    rmtree(killed / "lora")
    run = trainer(killed, resume=True)
    assert run.iteration == 0 and len(rows(killed)) == 1
    run.train()
    said = " ".join(capsys.readouterr().err.split())
    assert f"begins again: no checkpoint was finished in {killed / 'checkpoints'}" in said
    assert_same(tmp_path / "through", killed)


def test_a_text_is_replaced_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "recipe.yaml"
    replace_text(file, "one")
    monkeypatch.setattr("dgpo.disk.sync", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        replace_text(file, "another")
    assert file.read_text() == "one" and list(tmp_path.iterdir()) == [file]


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_checkpoint_of_a_later_format_is_refused_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path / "run")
    save_checkpoint(tmp_path, run.updater, {"iteration": 1})
    with monkeypatch.context() as later:
        later.setattr("dgpo.training.checkpoint_files.FORMAT", 2)
        save_checkpoint(tmp_path, run.updater, {"iteration": 2})
    with pytest.raises(UserError, match=r"00000002.*format 2, and this version of dgpo reads 1"):
        find_checkpoint(tmp_path)
    assert {"00000001", "00000002"} <= {place.name for place in tmp_path.iterdir()}


@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink])
def test_damaged_files_are_named_and_the_checkpoint_before_is_taken(
    damage: Any, tmp_path: Path
) -> None:
    run = trainer(tmp_path / "run")
    for name in ("tensors.safetensors", "state.json", "manifest.json"):
        folder = tmp_path / name
        for iteration in (1, 2):
            save_checkpoint(folder, run.updater, {"iteration": iteration})
        file = folder / "00000002" / name
        damage(file)
        found = find_checkpoint(folder)
        assert found.iteration == 1 and str(file) in found.damaged[folder / "00000002"]
        damage(folder / "00000001" / name)
        with pytest.raises(UserError, match="no checkpoint is whole") as error:
            find_checkpoint(folder)
        assert str(file) in str(error.value)
        assert str(folder / "00000001" / name) in str(error.value)


def test_a_damaged_checkpoint_costs_its_iterations_only(tmp_path: Path, capsys: Any) -> None:
    every = {"checkpoint": {"every": 1}}
    run = trainer(tmp_path / "run", algorithm=algorithm(), **every)
    run.train()
    (tmp_path / "through").mkdir()
    copytree(tmp_path / "run", tmp_path / "through", dirs_exist_ok=True)
    damaged = tmp_path / "run/checkpoints/00000002/tensors.safetensors"
    _flip(damaged)
    resumed = trainer(tmp_path / "run", algorithm=algorithm(), resume=True, **every)
    assert resumed.iteration == 1
    resumed.train()
    said = " ".join(capsys.readouterr().err.split())
    assert f"left aside: {damaged}" in said and "goes on after iteration 1" in said
    assert_same(tmp_path / "through", tmp_path / "run")

    # a pipeline that was trained already is not what the checkpoint goes on top of
    with pytest.raises(UserError, match=r"the weights of transformer are not those that the run"):
        trainer(tmp_path / "run", algorithm=algorithm(), model=resumed.model.pipe, resume=True)


def test_damaged_checkpoints_do_not_push_out_those_that_are_saved_next(
    tmp_path: Path, capsys: Any
) -> None:
    given: dict[str, Any] = {"algorithm": algorithm(), "train": {"iterations": 4}}
    trainer(tmp_path, checkpoint={"every": 1, "keep_last": 4}, **given).train()
    checkpoints = tmp_path / "checkpoints"
    for iteration in (2, 3, 4):
        _flip(checkpoints / f"{iteration:08d}/tensors.safetensors")
    (checkpoints / "00000004.damaged").mkdir()  # of an earlier time
    given["train"] = {"iterations": 2}
    trainer(tmp_path, resume=True, checkpoint={"every": 1, "keep_last": 2}, **given).train()
    assert find_checkpoint(checkpoints).iteration == 2
    assert sorted(place.name for place in checkpoints.iterdir()) == [
        "00000001", "00000002", "00000002.damaged", "00000003.damaged", "00000004.damaged",
        "00000004.damaged-2",
    ]  # fmt: skip
    said = " ".join(capsys.readouterr().err.split())
    assert "its folder is now 00000004.damaged-2" in said and "00000003.damaged" in said


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), True),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), True),
        (SafetensorError("IoError(StorageFull: No space left on device)"), True),
        (SafetensorError('Os { code: 122, message: "Disk quota exceeded" }'), True),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), False),
        (SafetensorError("InvalidHeader"), False),
    ],
)
def test_a_full_disk_and_a_full_quota_are_one_clear_error(
    error: Exception, full: bool, tmp_path: Path
) -> None:
    wanted = pytest.raises(UserError, match=r"the disk of .* is full, or your quota.*--resume")
    with wanted if full else pytest.raises(type(error)), says_disk_full(tmp_path):
        raise error


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = itertools.count()
    right = dgpo.training.checkpoint_files.save_file

    def full(tensors: Any, file: Path) -> None:
        if next(saves) == 1:
            file.write_bytes(b"half")
            raise SafetensorError("IoError(StorageFull: No space left on device)")
        right(tensors, file)

    monkeypatch.setattr("dgpo.training.checkpoint_files.save_file", full)
    run = trainer(tmp_path, algorithm=algorithm(), checkpoint={"every": 1})
    with pytest.raises(UserError, match=r"the disk of .* is full.*--resume"):
        run.train()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000001"]
    assert find_checkpoint(tmp_path / "checkpoints").iteration == 1
    assert any((tmp_path / "lora").glob("*.safetensors"))


PICKLES = (
    r"\bpickle\.(loads?|dumps?|Pickler|Unpickler)\b|\bfrom pickle import|\btorch\.save\("
    r"|allow_pickle=True"
)


def test_nothing_is_read_or_written_as_a_pickle() -> None:
    for file in (Path(__file__).parents[2] / "src").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(PICKLES, text), file
        for call in re.findall(r"\btorch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, (file, call)


def test_a_small_disk_fills_up_in_the_middle_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tmpfs of 8 MB where this user may mount one; elsewhere every write is refused as there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    filler, calls = disk / "filler", itertools.count()

    def filling(images: Any, prompts: Any) -> list[float]:
        if next(calls) == 2:  # the trial, the first iteration, and now
            if mounted:
                with suppress(OSError), filler.open("wb", buffering=0) as stream:
                    while stream.write(bytes(4096)):
                        pass
            else:
                refused = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                monkeypatch.setattr("dgpo.run.tracking.append_row", Mock(side_effect=refused))
        return brightness(images, prompts)

    filling.__name__ = "brightness"
    every = {"algorithm": algorithm(), "checkpoint": {"every": 1}}
    try:
        with pytest.raises(UserError, match=r"the disk of .* is full.*--resume"):
            trainer(disk / "run", filling, **every).train()
        assert find_checkpoint(disk / "run/checkpoints").iteration == 1
        filler.unlink(missing_ok=True)
        monkeypatch.undo()
        light(monkeypatch)
        trainer(disk / "run", resume=True, **every).train()
        trainer(tmp_path / "through", **every).train()
        assert_same(tmp_path / "through", disk / "run")
    finally:
        if mounted:
            gc.collect()  # tensors that were read are mapped to their file
            subprocess.run(["umount", str(disk)], check=True)
