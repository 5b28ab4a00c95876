"""The real packages of the trackers, offline: a run of the tiny model, stopped and gone on.

Each runs in a process of its own, since a tracker leaves threads, processes and exit hooks.
"""

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import sys
import torch
from families.tiny import sd3_small
from tiny_runs import PROMPTS, settings
from dgpo import Trainer
from dgpo.run.tracking import Tracker

torch.set_num_threads(1)
log = Tracker.log
rows = {"prompt": PROMPTS, "redness": torch.tensor([0.5, 1.0, float("nan"), 0.0])}
Tracker.log = lambda self, row: (self.table(row["iteration"], rows), log(self, row))
changes = {"samples": {"count": 2, "every": 1}, "eval": {"every": 1, "at_start": True}}
for resume, iterations in ((False, 2), (True, 3)):
    recipe = settings(
        **changes, train={"iterations": iterations}, run={"dir": "run", "loggers": sys.argv[1]}
    )
    trainer = Trainer(sd3_small(), "redness", PROMPTS, PROMPTS[:2], recipe=recipe, resume=resume)
    trainer.train()
"""
TAGS = ("train/loss", "train/reward_mean", "eval/overall", "samples/grid", "samples/before_after")


@pytest.fixture
def trained(tmp_path, request):
    """The run folder of a run that a tracker has seen, and the run's id."""
    name = request.param
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: make test-all installs the extra trackers")
    offline = {
        "WANDB_MODE": "offline",
        "SWANLAB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, name],
        cwd=tmp_path,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run/warnings.jsonl").exists(), "the logger did not fail"
    folder = tmp_path / "run"
    return folder, json.loads((folder / "loggers.json").read_text())["id"]


def records(file: Path) -> list[bytes]:
    """What lies in a file in the form of LevelDB's log, which wandb and swanlab both write."""
    data, place, found = file.read_bytes(), 7, []
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        part = data[place + 7 : place + 7 + size]
        if kind in (1, 2):  # whole, or the first of several parts
            found.append(part)
        else:
            found[-1] += part
        place += 7 + size
    return found


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["wandb"], indirect=True)
def test_wandb(trained):
    from wandb.proto.wandb_internal_pb2 import Record

    folder, run_id = trained
    files = sorted((folder / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2, "both halves have the same id"
    iterations, tags = [], set()
    for file in files:
        read = [Record.FromString(one) for one in records(file)]
        (run,) = [one.run for one in read if one.HasField("run")]
        assert (run.run_id, run.display_name, run.project) == (run_id, "run", "dgpo")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["run"]["loggers"] == ["wandb"] and config["group_size"] == 4
        for one in (one.history for one in read if one.HasField("history")):
            row = {item.key or item.nested_key[0]: item.value_json for item in one.item}
            tags |= set(row)
            if "train/loss" in row:
                iterations.append(int(row["iteration"]))
    assert iterations == [1, 2, 3] and set(TAGS) | {"rollouts"} <= tags
    assert list((folder / "wandb").glob("*/files/media/images/samples/*.png"))
    (first, *_) = (folder / "wandb").glob("*/files/media/table/*.json")
    assert json.loads(first.read_text())["columns"][0] == "prompt"


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["trackio"], indirect=True)
def test_trackio(trained):
    folder, run_id = trained
    with sqlite3.connect(folder.parent / "trackio/dgpo.db") as database:
        rows = database.execute("SELECT run_name, run_id, step, metrics FROM metrics").fetchall()
        configs = database.execute("SELECT config FROM configs").fetchall()
    assert {name for name, *_ in rows} == {f"run-{run_id}"}
    assert len({tracked for _, tracked, *_ in rows}) == 1, "both halves are one run"
    seen = [(step, json.loads(metrics)) for *_, step, metrics in rows]
    assert [step for step, values in seen if "train/loss" in values] == [1, 2, 3]
    tags = {tag for _, values in seen for tag in values}
    assert set(TAGS) | {"rollouts"} <= tags
    assert json.loads(configs[0][0])["group_size"] == 4
    assert list((folder.parent / "trackio/media").rglob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["swanlab"], indirect=True)
def test_swanlab(trained):
    folder, run_id = trained
    files = sorted((folder / "swanlog").glob(f"run-*-{run_id}/run-{run_id}.swanlab"))
    assert len(files) == 2, "both halves have the same id"
    for file, losses in zip(files, (2, 1), strict=True):
        read = records(file)
        assert any(b"dgpo" in one and run_id.encode() in one for one in read)
        tags = (*TAGS, "rollouts")
        counts = {tag: sum(tag.encode() in one for one in read) for tag in tags}
        assert all(counts.values()) and counts["train/loss"] >= losses, counts
    assert list((folder / "swanlog").glob("*/media/image/*.png"))
    assert list((folder / "swanlog").glob("*/media/echarts/*.json"))
    (config, *_) = (folder / "swanlog").glob("*/files/config.yaml")
    assert "group_size" in config.read_text()
