"""A run that is trained again from its ``run.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from shutil import copytree

import pytest
import yaml

from commands import run
from dgpo.recipe.files import find_recipe, read_recipe
from dgpo.run.manifest import differences, facts, free_folder
from families.tiny import sd3
from reliable import assert_same
from tiny_runs import PROMPTS, light, settings


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run by the command, with a seed that is not the default."""
    folder = tmp_path_factory.mktemp("first")
    sd3().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    recipe = settings(
        model=str(folder / "model"),
        rewards={"dgpo.rewards.shipped.stand_in:brightness": 1.0},
        prompts={"train": str(folder / "prompts.txt"), "eval": str(folder / "prompts.txt")},
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        light(patch)
        run("train", str(folder / "recipe.yaml"), f"run.dir={folder / 'run'}", "seed=3")
        yield folder / "run"


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def edited(folder: Path, change: Callable[[dict], object]) -> Path:
    file = folder / "run.json"
    manifest = json.loads(file.read_text())
    change(manifest["starts"][0])
    file.write_text(json.dumps(manifest))
    return file


def test_a_repeated_run_has_the_same_numbers(first: Path) -> None:
    before = contents(first)
    result = run("train", str(first / "run.json"))
    again = first.with_name("run-repeat")
    assert f"done: {again}" in result.stdout and "warning" not in result.stderr
    assert_same(first, again, ("metrics.jsonl", "evaluations.jsonl"))
    assert contents(first) == before
    there, here = (read_recipe(place / "recipe.yaml") for place in (first, again))
    assert here == {**there, "run": {**there["run"], "dir": str(again)}} and here["seed"] == 3
    assert free_folder(first / "run.json") == first.with_name("run-repeat-2")


def test_each_version_that_differs_is_warned_of(first: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    copytree(first, old)

    def change(start: dict) -> None:
        start["versions"] |= {"torch": "1.0", "numpy": None}
        start["commit"], start["machine"]["torch_threads"] = "0" * 40, -1

    manifest = edited(old, change)
    new = tmp_path / "elsewhere: 2"
    result = run("train", str(manifest), "train.iterations=1", f"run.dir={json.dumps(str(new))}")
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert [warning.split(":")[1].strip() for warning in warnings] == [
        "torch",
        "numpy",
        "the commit of dgpo",
        "torch_threads",
    ]
    assert warnings[0] == (
        f"warning: torch: the run was made with 1.0, here it is {version('torch')}"
    )
    assert (new / "metrics.jsonl").exists() and not (tmp_path / "old-repeat").exists()


def test_every_start_counts() -> None:
    here = facts()
    other = {**here, "versions": {**here["versions"], "peft": "0.0.1"}}
    assert differences([here]) == [] and differences([{"versions": {}}]) == []
    now = here["versions"]["peft"]
    for starts, either in (([here, other], f"{now} and 0.0.1"), ([other], "0.0.1")):
        assert differences(starts) == [f"peft: the run was made with {either}, here it is {now}"]


def test_never_into_the_old_folder(first: Path) -> None:
    before = contents(first)
    result = run("train", str(first / "run.json"), f"run.dir={first}", code=2)
    assert "already holds a run" in result.stderr
    result = run("train", str(first / "run.json"), "--resume", code=2)
    assert f"dgpo train {first} --resume" in result.stderr
    assert contents(first) == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"starts": []}', '{"starts": [3]}', '{"starts": [{}]}', "a: 1"]
)
def test_a_file_that_is_no_manifest(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    (tmp_path / "recipe.yaml").write_text("model: pocket")
    result = run("train", str(file), code=2)
    assert result.stderr.count("\n") == 1 and "is no manifest of a run" in result.stderr
    assert [place.name for place in tmp_path.iterdir()].count("recipe.yaml") == 1


def test_a_manifest_without_its_recipe(first: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_bytes((first / "run.json").read_bytes())
    for command in ("train", "plan"):
        result = run(command, str(file), code=2)
        assert "recipe.yaml, is not beside it" in result.stderr
    result = run("train", str(tmp_path / "other" / "run.json"), code=2)
    assert "run.json' is no file" in result.stderr


def test_plan_takes_a_manifest(first: Path) -> None:
    by_manifest, by_recipe = (
        run("plan", str(first / name)).stdout.splitlines() for name in ("run.json", "recipe.yaml")
    )
    # the last lines hold what this process has taken by now
    assert by_manifest[0] == by_recipe[0] and str(first.with_name("model")) in by_recipe[0]
    assert len(by_manifest) == len(by_recipe)


def test_where_a_run_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "results" / "turbo-seed1-run.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    beside = kept.with_name("turbo-seed1-recipe.yaml")
    beside.write_text("")
    assert find_recipe(kept) == beside
    monkeypatch.chdir(kept.parent)
    assert free_folder(kept) == Path("runs/turbo-seed1-repeat")
    assert free_folder(Path("run.json")) == tmp_path / "results-repeat"
