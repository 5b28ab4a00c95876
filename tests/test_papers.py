"""docs/papers.md: every recipe has a paper, and settings and figures are read, not copied."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from benchmark_files import ROOT, benchmark
from dgpo.recipe import Recipe
from dgpo.recipe.files import PACKAGED

NO_PART_OF_THE_UPDATE = {
    *("model", "name", "rewards", "train", "eval", "batch"),
    *("iterations", "micro_batch", "every", "metrics", "checkpoint"),
}


@pytest.fixture(scope="module")
def papers() -> ModuleType:
    return benchmark("papers")


def without_figures(page: str) -> str:
    return re.sub(r"\| [^|]* \|$", "|", page, flags=re.MULTILINE).strip()


def test_the_page_is_what_the_recipes_say(papers: ModuleType) -> None:
    written = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    made = papers.page(ROOT / "benchmarks" / "results")
    assert without_figures(written) == without_figures(made), "run: make papers"


def test_settings_are_quoted_from_the_lines_that_are_marked(papers: ModuleType) -> None:
    found = papers.quoted(PACKAGED / "sd35m-ocr.yaml")
    recipe = Recipe.load("sd35m-ocr").to_dict()
    assert {"algorithm.beta = 100", "group_size = 16", "rollout.steps = 10"} <= set(found)
    for setting in found:
        path, _, value = setting.partition(" = ")
        at = recipe
        for key in path.split("."):
            at = at[key]
        if re.fullmatch(r"[\d.e-]+", value):
            assert at == float(value), setting
    assert not any(setting.startswith(("train.iterations", "precision")) for setting in found)


def test_differences_are_what_the_lines_say(papers: ModuleType) -> None:
    def settings(name: str) -> list[str]:
        return [one.partition("`: ")[0] for one in papers.differences(PACKAGED / f"{name}.yaml")]

    assert settings("sd35m-ocr") == [
        "`precision = bfloat16",
        "`rollout.switch_to_old_after = 200",
    ]
    rival = settings("pocket-geneval-diffusion_nft")
    assert rival[:2] == [papers.SMALL, "`algorithm.kl = 0"]
    # a line of a preset of DGPO on Stable Diffusion 3.5 is published or says that it is not,
    # unless it is no part of the update
    for task in papers.TASKS:
        for mode in ("", "-cfgfree", "-cfgfree-ema"):
            file = PACKAGED / f"sd35m-{task}{mode}.yaml"
            unmarked = {
                line.partition(":")[0].strip()
                for line in file.read_text().splitlines()
                if "published" not in line and not line.startswith("#") and ": " in line
            }
            assert unmarked <= NO_PART_OF_THE_UPDATE


def test_figures_are_read_from_the_results(papers: ModuleType, tmp_path: Path) -> None:
    assert papers.figure("pocket-ocr", tmp_path) == papers.NOT_MEASURED
    rows = [
        {"iteration": 0, "seconds": 0, "overall": 0.5, "ci95": [0.4, 0.6], "rewards": {"a": 0.5}},
        {"iteration": 9, "seconds": 90, "overall": 0.9, "ci95": [0.8, 1.0], "rewards": {"a": 0.9}},
    ]
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "pocket-ocr-seed3-evaluations.jsonl").write_text(text)
    (tmp_path / "pocket-ocr-extra-seed0-evaluations.jsonl").write_text(text)  # another recipe's
    said = "a 0.500 to 0.900 [0.800, 1.000] after 1.5 minutes (seed 3)"
    assert papers.figure("pocket-ocr", tmp_path) == said
    assert said in papers.page(tmp_path)
