"""Writes docs/papers.md: paper, recipe, quoted settings, and what the recipe reached here.

    make papers
    python benchmarks/papers.py [--results benchmarks/results] [--page docs/papers.md]

Quoted are the lines of a recipe whose comment begins with "published"; figures are read from
``NAME-seedK-evaluations.jsonl``, which is a run's ``evaluations.jsonl``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dgpo.recipe.files import PACKAGED

HERE = Path(__file__).parent


class Paper(NamedTuple):
    name: str
    arxiv: str
    recipes: list[str]
    published: Mapping[str, str] = MappingProxyType({})
    """What the paper reports for a recipe's task, on the held-out prompts."""


def _sd35(task: str) -> list[str]:
    return [f"sd35m-{task}{mode}" for mode in ("", "-cfgfree")]


TASKS = ("geneval", "ocr", "pickscore")
PAPERS = [
    Paper(
        "DGPO",
        "2510.08425",
        [
            *(name for task in TASKS for name in _sd35(task)),
            *("pocket-geneval", "pocket-geneval-turbo", "pocket-ocr"),
            *("pocket-sd-ddim", "pocket-sd-plms"),
        ],
        {"sd35m-geneval": "0.97", "sd35m-ocr": "0.96", "sd35m-pickscore": "23.89"},
    ),
    Paper("TDM-R1 (EMA reference)", "2603.07700", [f"sd35m-{task}-cfgfree-ema" for task in TASKS]),
    Paper(
        "Flow-GRPO",
        "2505.05470",
        ["pocket-geneval-flow_grpo", "pocket-geneval-flow_grpo_fast"],
    ),
    Paper("MixGRPO", "2507.21802", ["pocket-geneval-mix_grpo"]),
    Paper("GRPO-Guard", "2510.22319", ["pocket-geneval-grpo_guard"]),
    Paper("Flow-DPPO", "2606.11025", ["pocket-geneval-flow_dppo"]),
    Paper("DDPO", "2305.13301", ["pocket-sd-ddpo"]),
    Paper("DiffusionNFT", "2509.16117", ["pocket-geneval-diffusion_nft"]),
    Paper("AWM", "2509.25050", ["pocket-geneval-awm"]),
    Paper("Diffusion-DPO", "2311.12908", ["pocket-geneval-diffusion_dpo"]),
    Paper("CRD", "2603.14128", ["pocket-geneval-crd"]),
    Paper("Reward-weighted regression", "2302.12192", ["pocket-geneval-rwr"]),
    Paper("Best of n (RAFT)", "2304.06767", ["pocket-geneval-best_of_n"]),
]
NOT_MEASURED = "not measured"
SMALL = (
    "model, task, sizes, LoRA and learning rate are those of a small model; the recipe's head says "
    "what was published"
)
ABOUT = """# Papers

Which recipe stands for which paper, which of its settings are quoted from it, and what it reached
here.

- **quoted settings**: the lines of the recipe that are marked "published", with the paper they are
  from where it is another one. The recipes `pocket-*` train a small model on a task of the same
  kind, not the papers' model, so their figures are no reproduction of the papers'.
- **differences**: the lines of the recipe that say how they differ from the published
  configuration. In the recipes `sd35m-*` every other line is equal to it, except for what is no
  part of the update: iterations, batches, what is evaluated how often, checkpoints. The published
  runs of DGPO evaluate in 14 or in 10 steps; here it is 14 with guidance and 10 without.
- **published**: what the paper reports for SD3.5-M on the task (base model: GenEval 0.63, OCR 0.59,
  PickScore 21.72).
- **our figure**: held-out score of the base model, and of the last evaluation with its 95% interval
  over prompts, from `benchmarks/results`; "{not_measured}" where there is no run. The recipes
  `sd35m-*` need GPUs that the project has not had.

| paper | recipe | quoted settings | differences | published | our figure |
|---|---|---|---|---|---|
{rows}

The README of DGPO's published code gives other numbers than its configuration files for two modes:
a KL weight of 1e-3 with a clip of 1e-3, and of 1e-3 with 1e-5. The recipes follow the files.

What the code of this project does otherwise than DGPO's, in all recipes:

- The noise level of a trained point is the solver's own, there int(timestep) / 1000.
- Where a group is larger than `train.micro_batch` the policy is predicted twice, which costs time
  and changes nothing.

How each method's loss is defined, and where it differs from its paper:
[algorithms.md](algorithms.md). This page is written by

    python benchmarks/papers.py

"""


def remarks(file: Path) -> Iterator[tuple[str, str]]:
    """The settings of a recipe that have a comment, ``a.b = value``, each with it."""
    path: list[tuple[int, str]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        code, _, comment = line.partition("#")
        key, colon, value = code.strip().partition(":")
        if not colon or key.startswith("-"):
            continue
        indent = len(code) - len(code.lstrip())
        path = [(depth, name) for depth, name in path if depth < indent] + [(indent, key)]
        if comment and value.strip():
            yield f"{'.'.join(name for _, name in path)} = {value.strip()}", comment.strip()


def quoted(file: Path) -> list[str]:
    """The settings of a recipe that are marked as published, ``a.b = value``."""
    return [
        setting + (f" ({said[10:]})" if said.startswith("published for ") else "")
        for setting, said in remarks(file)
        if said.startswith("published")
    ]


def differences(file: Path) -> list[str]:
    """The settings of a recipe that say how they differ from what was published."""
    small = [SMALL] if file.stem.startswith("pocket-") else []
    return small + [
        f"`{setting}`: {said}"
        for setting, said in remarks(file)
        if "published" in said and not said.startswith("published")
    ]


def figure(name: str, results: Path) -> str:
    """The held-out scores of a recipe's runs, or that there are none."""
    runs = [_run(file) for file in sorted(results.glob(f"{name}-seed*-evaluations.jsonl"))]
    return "; ".join(runs) or NOT_MEASURED


def _run(file: Path) -> str:
    rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    first, last = rows[0], rows[-1]
    low, high = last["ci95"]
    seed = file.name.rpartition("-seed")[2].partition("-")[0]
    base = f"{first['overall']:.3f} to " if first["iteration"] == 0 else ""
    score = f"{base}{last['overall']:.3f} [{low:.3f}, {high:.3f}]"
    metric = next(iter(last["rewards"]))
    return f"{metric} {score} after {last['seconds'] / 60:.1f} minutes (seed {seed})"


def _rows(results: Path) -> Iterator[str]:
    for paper in PAPERS:
        for name in paper.recipes:
            file = PACKAGED / f"{name}.yaml"
            cells = [
                f"{paper.name}, [{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})",
                f"`{name}`",
                "<br>".join(f"`{one}`" for one in quoted(file)) or "none",
                "<br>".join(differences(file)) or "none",
                paper.published.get(name, ""),
                figure(name, results),
            ]
            yield f"| {' | '.join(cells)} |"


def page(results: Path) -> str:
    """All of docs/papers.md."""
    return ABOUT.format(rows="\n".join(_rows(results)), not_measured=NOT_MEASURED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "papers.md")
    given = parser.parse_args()
    given.page.write_text(page(given.results).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
