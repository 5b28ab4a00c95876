"""What a command refuses at once is refused before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

SMALL = {"rewards": {"redness": 1.0}, "prompts": {"train": "pocket-geneval/train"}}
HEAVY = {"diffusers", "transformers", "peft"}
RECIPES = ("train", "plan", "rank")
# One process for all: what each command brings in is seen before the next one.
PROGRAM = """
import json, sys
from typer.testing import CliRunner
from dgpo.cli import app
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    said = result.stderr or repr(result.exception)
    print(json.dumps([result.exit_code, said, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("checks")
    recipe = {**SMALL, "run": {"dir": str(place / "run")}}
    (place / "small.yaml").write_text(yaml.safe_dump(recipe))
    (place / "one.txt").write_text("a red cat\n")
    Image.new("RGB", (8, 8)).save(place / "red.png")
    (place / "groups").mkdir()
    (place / "groups" / "groups.jsonl").write_text("")
    (place / "old").mkdir()
    (place / "old" / "recipe.yaml").write_text("")
    return place


def outcomes(folder: Path, commands: list[list[str]]) -> list[tuple[int, str, set[str]]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [(code, said, set(modules)) for code, said, modules in lines]


def test_mistakes_are_told_without_the_libraries(folder: Path) -> None:
    model, out = ["--model", "pocket"], ["--out", "out"]
    score = ["score", "--images", "red.png", "--prompts", "one.txt", "--reward"]
    collect = ["collect", "small.yaml", "--groups", "1", "--out"]
    cases = [
        ("does not exist", ["sample", *model, *out, "--prompts", "no.txt"]),
        ("is a file", ["sample", *model, "--out", "one.txt/x", "--prompts", "one.txt"]),
        ("--lora no", ["sample", *model, *out, "--prompt", "a", "--lora", "no"]),
        ("bfloat16", ["sample", *model, *out, "--prompt", "a", "--precision", "fp16"]),
        ("not KEY=VALUE", ["sample", *model, *out, "--prompt", "a", "--call", "x"]),
        ("'pocket-geneval'", ["eval", *model, "--benchmark", "pocket-genevl"]),
        ("leave out --prompts", ["eval", *model, "--benchmark", "pocket-ocr", "--prompts", "x"]),
        ("does not exist", ["eval", *model, "--benchmark", "geneval", "--prompts", "no.txt"]),
        ("--lora no", ["eval", *model, "--benchmark", "pocket-geneval", "--lora", "no"]),
        ("is a folder", ["eval", *model, "--benchmark", "pocket-geneval", "--json", "."]),
        ("no such folder", ["score", "--images", "no", "--prompts", "one.txt", "--reward", "x"]),
        ("did you mean 'redness'", [*score, "rednes"]),
        ("is a file", [*score, "redness", "--json", "one.txt/x"]),
        ("did you mean 'redness'", ["serve", "--reward", "rednes"]),
        ("give --token-file", ["serve", "--reward", "redness", "--host", "0.0.0.0"]),
        ("holds no run", ["export", "no"]),
        ("--format x", ["export", "old", "--format", "x"]),
        ("is not KEY=VALUE", ["check", "pocket", "height"]),
        ("no.png", ["check", "pocket", "--image", "no.png"]),
        ("does not exist", ["prompts", "ocr", "--out", "x.txt", "--without", "no.txt"]),
        ("neither a file nor a recipe", ["train", "nosuch"]),
        ("not KEY=VALUE", ["plan", "small.yaml", "x"]),
        *[("no.txt", [command, "small.yaml", "prompts.train=no.txt"]) for command in RECIPES],
        ("no.txt", ["train", "small.yaml", "prompts.eval=no.txt"]),
        ("no.txt", [*collect, "out", "prompts.train=no.txt"]),
        ("no such folder", ["train", "small.yaml", "data.preferences=nothing"]),
    ]
    for (word, arguments), found in zip(
        cases, outcomes(folder, [case[1] for case in cases]), strict=True
    ):
        code, said, modules = found
        assert code == 2 and word in said, (arguments, found[:2])
        assert not modules & (HEAVY | {"torch"}), arguments


def test_a_recipe_that_cannot_run_is_refused_before_its_libraries_are_imported(
    folder: Path,
) -> None:
    collect = ["collect", "small.yaml", "--groups", "1", "--out"]
    cases = [
        ("did you mean train.lr?", ["train", "small.yaml", "train.learning_rate=1"]),
        ("did you mean 'redness'", ["train", "small.yaml", "rewards={rednes: 1}"]),
        ("already holds a run", ["train", "small.yaml", "run.dir=old"]),
        ("is a file", ["train", "small.yaml", "run.dir=one.txt/x"]),
        ("--lora no", ["rank", "small.yaml", "--lora", "no"]),
        ("already holds a run", ["rank", "small.yaml", "--train", "run.dir=old"]),
        ("holds groups already", [*collect, "groups"]),
        ("--lora no", [*collect, "out", "--lora", "no"]),
        ("is a file", ["compare", "small.yaml", "--out", "one.txt"]),
        ("no.txt", ["compare", "small.yaml", "prompts.eval=no.txt", "--out", "out"]),
    ]
    for (word, arguments), found in zip(
        cases, outcomes(folder, [case[1] for case in cases]), strict=True
    ):
        code, said, modules = found
        assert code == 2 and word in said, (arguments, found[:2])
        assert not modules & HEAVY, arguments
