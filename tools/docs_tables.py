"""Writes the tables of docs that the registry, the classes behind it and counted figures know.

    make docs-tables        # python -m tools.docs_tables
    python -m tools.docs_tables --check    # writes nothing; ends with 1 if a page is old

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; the rest of a page is written
by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from dgpo import registry
from dgpo.errors import UserError
from tools import architecture

DOCS = architecture.HERE / "docs"
_POINTS = {"forward": "pictures, noised again", "trajectory": "steps of the rollout"}


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (list(titles), *rows)]
    lines = ["".join(f"| {cell} " if cell else "| " for cell in row) + "|" for row in cells]
    lines.insert(1, "|---" * len(cells[0]) + "|")
    return "\n".join(lines)


def algorithms() -> str:
    """What each algorithm is, and what it costs and reads with its own defaults."""
    titles = ("name", "what it is", "paper", "trains on", "forward passes of a trained sample",
              "samples trained", "pictures of", "old policy moves")  # fmt: skip
    return table(titles, map(_algorithm, registry.ALGORITHMS))


def _algorithm(name: str) -> list[str]:
    entry, algorithm = registry.ALGORITHMS[name], registry.resolve("algorithm", name)()
    passes = ["policy", *(one for one in ("ref", "old") if one in algorithm.snapshots)]
    if algorithm.kl_guidance is not None:
        passes.append("ref with guidance (twice the cost)")
    few = algorithm.trained_per_group
    old = "not used"
    if "old" in algorithm.snapshots:
        old = f"each {algorithm.old_moves}"
        if all(algorithm.old_decay(step) == 0 for step in range(1000)):
            old += ", becomes the policy"
    return [
        f"`{name}`",
        entry.about,
        f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})" if entry.paper else "",
        _POINTS[entry.points],
        ", ".join(passes),
        "all" if few is None else f"{few} of each group",
        "the old policy" if algorithm.samples_from == "old" else "the policy",
        old,
    ]


def settings() -> str:
    """Every setting of every algorithm; those that are the same in several are one row."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for name in registry.ALGORITHMS:
        for key, field in registry.resolve("algorithm", name).model_fields.items():
            meaning = " ".join((field.description or "").split()).replace("``", "`")
            found.setdefault((key, _shown(field.get_default()), meaning), []).append(f"`{name}`")
    rows = ([f"`{key}`", f"`{default}`", ", ".join(names), meaning]
            for (key, default, meaning), names in sorted(found.items()))  # fmt: skip
    return table(("setting", "default", "of", "what it is"), rows)


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False)
    return text.removesuffix("...\n").strip()


def rewards() -> str:
    """Each reward as `dgpo list rewards` shows it, and where its weights come from."""
    titles = ("name", "measures", "range", "licence", "weights", "variables", "needs")
    rows = []
    for name, entry in registry.REWARDS.items():
        install = f"`{entry.install}`" if entry.install else ""
        needs = ", ".join(filter(None, [install, entry.needs]))
        size = f" ({entry.weights})" if entry.weights.endswith("GB") else ""
        weights = f"{entry.hub}{size}" if entry.hub else entry.weights
        rows.append([f"`{name}`", entry.about, entry.range, entry.licence, weights,
                     entry.variables, needs])  # fmt: skip
    return table(titles, rows)


def samplers() -> str:
    """Which sampler takes over from which kind of scheduler, tried."""
    import diffusers

    from dgpo.models.samplers.schedulers import make_scheduler

    zero: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    bases = {
        "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
        "epsilon": diffusers.DDIMScheduler(clip_sample=False),
        "v": diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
        "v, zero terminal SNR": diffusers.DDIMScheduler(
            clip_sample=False, prediction_type="v_prediction", **zero
        ),
        "v, shifted SNR": diffusers.CogVideoXDDIMScheduler(
            clip_sample=False, prediction_type="v_prediction", snr_shift_scale=3.0
        ),
    }

    def verdict(name: str, base: Any) -> str:
        try:
            make_scheduler(name, base)
        except UserError:
            return "refused"
        return "yes"

    rows = ([name, *(verdict(name, base) for base in bases.values())] for name in registry.SAMPLERS)
    return table(("sampler", *bases), rows)


def models() -> str:
    """The models inside the package."""
    rows = ([f"`{name}`", entry.about] for name, entry in registry.MODELS.items())
    return table(("name", "what it is"), rows)


def counts() -> str:
    """What passes and optimiser steps cost before and after a change, as counted."""
    file = architecture.HERE / "benchmarks" / "results" / "counts.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    columns = [found.get("before", {}), found.get("after", {})]
    names = {(what, name): None for one in columns for what in one for name in one[what]}
    rows = (
        [what, name, *(_number(one.get(what, {}).get(name)) for one in columns)]
        for what, name in names
    )
    return table(("what", "figure", "before", "after"), rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "algorithms": ("algorithms.md", algorithms),
    "settings": ("algorithms.md", settings),
    "rewards": ("rewards.md", rewards),
    "samplers": ("samplers.md", samplers),
    "models": ("models.md", models),
    "counts": ("performance.md", counts),
}
"""The page of each table, and what makes it."""


def pages() -> dict[Path, str]:
    """The pages with tables, as they should be."""
    found: dict[Path, str] = {}
    for name, (page, make) in TABLES.items():
        file = DOCS / page
        text = found.get(file) or file.read_text(encoding="utf-8")
        found[file] = architecture.with_section(text, name, make())
    return found


def main(arguments: list[str] | None = None) -> int:
    """Write the tables, and the page and picture of the rooms; or only check them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args(arguments)
    old = []
    for file, text in pages().items():
        if given.check and file.read_text(encoding="utf-8") != text:
            old.append(file)
        elif not given.check:
            file.write_text(text, encoding="utf-8")
    for file in old:
        print(f"{file.relative_to(architecture.HERE)} is old: run make docs-tables")
    return bool(old) | architecture.main(["--check"] if given.check else [])


if __name__ == "__main__":
    sys.exit(main())
