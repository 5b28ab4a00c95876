"""A run that goes on is the run that was begun: its folder, its data, its settings."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from shutil import copytree, move
from typing import Any

import psutil
import pytest
import yaml

import dgpo.trainer
from commands import run
from dgpo.errors import UserError
from dgpo.run.lock import FILE
from dgpo.trainer import Trainer
from dgpo.training.checkpoint_files import _hash_of, find_checkpoint
from families.tiny import sd3_small
from tiny_runs import PROMPTS, brightness, light, rows, settings, trainer

REWARD = """
import os
def score(images, prompts, want):
    os.chdir("/")
    return [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]
"""


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


def prompts(*wanted: int) -> str:
    rows = zip(PROMPTS[: len(wanted)], wanted, strict=True)
    return "".join(json.dumps({"prompt": text, "want": want}) + "\n" for text, want in rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project whose run was begun by relative names, with a reward that changes the folder."""
    project = tmp_path_factory.mktemp("project")
    (project / "one.jsonl").write_text(prompts(1, 2, 3, 4))
    (project / "score.py").write_text(REWARD)
    recipe = settings(
        model="families.tiny:sd3_small",
        rewards={"score.py:score": 1.0},
        prompts={"train": "one.jsonl"},
        run={"dir": "runs/orig", "loggers": []},
    )
    (project / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        light(patch)
        patch.chdir(project)
        run("train", "recipe.yaml")
    yield project


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project; the current folder holds other files of the same names."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "one.jsonl").write_text(prompts(0, 0))
    (elsewhere / "score.py").write_text("raise RuntimeError('the wrong file')\n")
    monkeypatch.chdir(elsewhere)
    copytree(made / "runs", tmp_path / "runs")
    return tmp_path


def goes_on(*words: object, code: int = 0) -> str:
    result = run("train", *map(str, words), code=code)
    assert "Traceback" not in result.stderr
    return result.stderr


def iterations(folder: Path) -> list[int]:
    return [row["iteration"] for row in rows(folder)]


def test_it_stays_in_its_folder_and_finds_its_files_from_anywhere(
    made: Path, project: Path
) -> None:
    assert sorted(path.name for path in (made / "runs").iterdir()) == ["orig"]
    assert not (made / "runs" / "orig" / FILE).exists()
    saved = yaml.safe_load((project / "runs/orig/recipe.yaml").read_text())
    assert saved["run"]["dir"] == str(made / "runs/orig")
    assert saved["prompts"]["train"] == str(made / "one.jsonl")
    assert list(saved["rewards"]) == ["score.py:score"]
    odd = project / "runs" / "a #2"
    move(project / "runs/orig", odd)
    before = (odd / "recipe.yaml").read_text()
    said = goes_on(odd, "--resume", "train.iterations=3")
    assert "goes on after iteration 2" in said and "warning" not in said
    assert "settings that differ from those of before:\n  train.iterations: 2 -> 3\n" in said
    assert iterations(odd) == [1, 2, 3] and iterations(made / "runs/orig") == [1, 2]
    # only the folder's place has changed, and that is no other setting
    assert (odd / "recipe-1.yaml").read_text() == before
    # the line that is printed goes on with it
    line = goes_on(odd, "--resume").split("or dgpo train ")[1].splitlines()[0]
    words = shlex.split(line.replace("MORE", "4"))
    assert words[0] == str(odd / "recipe.yaml")
    goes_on(*words)
    assert iterations(odd) == [1, 2, 3, 4] and (odd / "recipe-2.yaml").exists()


def test_a_copy_goes_on_in_the_copy(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orig, copy = project / "runs/orig", project / "runs/copy"
    copytree(orig, copy)
    monkeypatch.chdir(project / "runs")
    goes_on("copy/recipe.yaml", "--resume", "train.iterations=3")
    assert (iterations(copy), iterations(orig)) == ([1, 2, 3], [1, 2])
    monkeypatch.chdir(project / "runs")
    said = goes_on("copy/recipe.yaml", "train.iterations=4", code=2)
    assert "'copy' already holds a run (3 iterations)" in said
    for name in ("2024", "1e3", "on", "b: c"):
        copy = copy.rename(project / "runs" / name)
        said = goes_on(name, "--resume", "lora.alpha=3", code=2)
        assert f"what is saved in {copy} was trained with" in said


def test_other_content_is_refused_or_told(project: Path) -> None:
    folder, here = project / "runs/orig", project / "elsewhere"
    # what the checkpoint says of them: as if the files had lain here and changed since
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["prompts"]["train"] = str(here / "one.jsonl")
    (here / "score.py").write_text(REWARD + "\n# a new line\n")
    recipe["rewards"]["score.py:score"]["use"] = str(here / "score.py:score")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    place = find_checkpoint(folder / "checkpoints")

    def changed(data: Any) -> None:
        manifest = {**place.manifest, "data": data}
        text = json.dumps({**manifest, "sha256": _hash_of(manifest)})
        (place.folder / "manifest.json").write_text(text)

    data = place.manifest["data"]
    assert data.keys() == {
        "prompts.train", "prompts.eval", "rewards.score.py:score", "eval.metrics.score.py:score"
    }  # fmt: skip
    changed(data | {"prompts.train": {**data["prompts.train"], "source": str(here / "one.jsonl")}})
    said = goes_on(folder, "--resume", code=2)
    assert "these 2 rows are not the 4" in said and said.count("\n") == 1
    (here / "one.jsonl").write_text(prompts(1, 2, 3, 5))
    assert "these 4 rows are not the 4" in goes_on(folder, "--resume", code=2)
    (here / "one.jsonl").rename(here / "two.jsonl")
    said = goes_on(folder, "--resume", f"prompts.train={here / 'two.jsonl'}", "train.iterations=3")
    assert f"prompts.train: {here / 'one.jsonl'} -> {here / 'two.jsonl'}" in said
    assert "warning: rewards.score.py:score: the file of this reward" in said
    assert iterations(folder) == [1, 2, 3]
    # saved anew, it is what the run is trained on
    said = goes_on(folder, "--resume", "train.iterations=4")
    assert "prompts.train" not in said and "warning" not in said


def test_a_run_of_an_earlier_version_goes_on(project: Path) -> None:
    folder = project / "runs/orig"
    place = find_checkpoint(folder / "checkpoints")
    manifest = {key: value for key, value in place.manifest.items() if key != "data"}
    text = json.dumps({**manifest, "sha256": _hash_of(manifest)})
    (place.folder / "manifest.json").write_text(text)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["run"]["dir"] = "runs/orig"
    recipe["rewards"] = {"dgpo.rewards.shipped.stand_in:brightness": 1.0}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    goes_on(folder, "--resume", "train.iterations=3")
    assert iterations(folder) == [1, 2, 3]


def test_settings_that_give_weights_their_meaning_are_refused(project: Path) -> None:
    folder = project / "runs/orig"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words = ["lora.alpha=800", "seed=5", "train.iterations=3"]
    said = goes_on(folder, "--resume", *words, code=2)
    assert "  lora.alpha: 12.0 -> 800.0\n  seed: 0 -> 5\n" in said
    # another model is known by its weights
    said = goes_on(folder, "--resume", "model=pocket", code=2)
    assert "are not those that the run in" in said
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_start_is_refused_and_told_who_has_the_run(project: Path) -> None:
    folder = project / "runs/orig"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        started = psutil.Process(other.pid).create_time()
        held = {"host": socket.gethostname(), "pid": other.pid, "started": started, "time": "now"}
        (folder / FILE).write_text(json.dumps(held))
        said = goes_on(folder, "--resume", "train.iterations=3", code=2)
        other.kill()
    assert f"process {other.pid} on {socket.gethostname()} holds this run" in said
    assert iterations(folder) == [1, 2] and (folder / FILE).exists()
    goes_on(folder, "--resume", "train.iterations=3")
    assert iterations(folder) == [1, 2, 3] and not (folder / FILE).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, None])
def test_the_folder_is_free_after_every_end(
    error: type[BaseException] | None, tmp_path: Path
) -> None:
    seen = []

    def reward(images: Any, prompts: Any) -> list[float]:
        seen.append(json.loads((tmp_path / FILE).read_text())["pid"])
        if error is not None and len(seen) > 1:
            raise error("stop")
        return brightness(images, prompts)

    made = trainer(tmp_path, reward)
    with nullcontext() if error is None else pytest.raises(error):
        made.train()
    assert set(seen) == {os.getpid()} and not (tmp_path / FILE).exists()


def test_a_folder_that_cannot_be_made_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dgpo.trainer, "load_data", None)
    with pytest.raises(UserError, match=r"run\.dir = '/proc/none/x': .* cannot be made"):
        trainer(Path("/proc/none/x"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="prompt row 0"):
        trainer(tmp_path / "runs/new", train_dataset=["  "])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", ["", None, 3, ["runs/a"]])
def test_what_resume_cannot_be(resume: Any) -> None:
    with pytest.raises(UserError, match=r"resume = .*: give True, False, 'last' or a run folder"):
        Trainer(model=sd3_small(), resume=resume)


@pytest.mark.slow
def test_two_commands_at_once(project: Path, made: Path) -> None:
    """Two processes as a user starts them; the second is refused, the first trains to its end."""
    folder = project / "runs/orig"
    command = [sys.executable, "-m", "dgpo", "train", str(folder), "--resume"]
    command += ["train.iterations=6"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "env": env}
    started = [subprocess.Popen(command, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in started]
    codes = [process.returncode for process in started]
    assert sorted(codes) == [0, 2], said
    refused, other = codes.index(2), codes.index(0)
    assert f"process {started[other].pid} on" in said[refused]
    assert iterations(folder) == [1, 2, 3, 4, 5, 6]
