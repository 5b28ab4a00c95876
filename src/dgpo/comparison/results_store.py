"""Keep what finished runs have measured as small files to commit.

With these files every figure can be drawn again, anywhere and without training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgpo.comparison.plan import Run
from dgpo.comparison.runs import ENDED, starts_of
from dgpo.disk import replace_text
from dgpo.errors import UserError
from dgpo.recipe.files import MANIFEST, read_recipe
from dgpo.recipe.plain_yaml import write_yaml
from dgpo.run.tracking import read_jsonl

SETTINGS_UNKNOWN = "settings-unknown"
"""A file in a run's folder: the recipe of its measurements was not kept."""


def keep(run: Run, results: Path) -> None:
    """Write a finished run's recipe, machine, metrics and evaluations to ``RESULTS/NAME-seedK-*``.

    A run whose settings are unknown came from there, and is left alone. Metrics are written with
    six digits, evaluations as they are.
    """
    if settings_unknown(run):
        return
    results.mkdir(parents=True, exist_ok=True)
    recipe = read_recipe(run.folder / "recipe.yaml")
    recipe.pop("run", None)
    replace_text(_file(run, results, "recipe.yaml"), write_yaml(recipe))
    rows = [_rounded(row) for row in read_jsonl(run.folder / "metrics.jsonl")]
    _write_jsonl(_file(run, results, "metrics.jsonl"), rows)
    evaluations = read_jsonl(run.folder / "evaluations.jsonl")
    _write_jsonl(_file(run, results, "evaluations.jsonl"), evaluations)
    if kept := [_public(start) for start in starts_of(run.folder)]:
        replace_text(_file(run, results, MANIFEST), json.dumps({"starts": kept}, indent=1) + "\n")


def take(run: Run, results: Path) -> bool:
    """Make the folder of a finished run from what was kept of it.

    Returns:
        Whether that was done; a folder that exists already stays as it is.

    Raises:
        UserError: only a part was kept, or parts of different runs.
    """
    files = [_file(run, results, name) for name in ("metrics.jsonl", "evaluations.jsonl")]
    if run.folder.exists() or not any(file.exists() for file in files):
        return False
    metrics, evaluations = (read_jsonl(file) for file in files)
    if not metrics or not evaluations:
        missing = files[0] if not metrics else files[1]
        raise UserError(f"{missing} is missing or empty: keep it beside the run's other files")
    last = evaluations[-1]["iteration"]
    metrics = [row for row in metrics if row["iteration"] <= last]
    if not metrics or metrics[-1]["iteration"] != last:
        raise UserError(f"{files[0]} has no iteration {last}, the last of {files[1].name}")
    run.folder.mkdir(parents=True)
    recipe, machine = _file(run, results, "recipe.yaml"), _file(run, results, MANIFEST)
    if recipe.exists():
        replace_text(run.folder / "recipe.yaml", recipe.read_text(encoding="utf-8"))
    else:
        replace_text(run.folder / "recipe.yaml", run.recipe.to_yaml())
        replace_text(run.folder / SETTINGS_UNKNOWN, "")
    if machine.exists():
        replace_text(run.folder / MANIFEST, machine.read_text(encoding="utf-8"))
    _write_jsonl(run.folder / "evaluations.jsonl", evaluations)
    _write_jsonl(run.folder / "metrics.jsonl", metrics)
    replace_text(run.folder / ENDED, f"{last}\n")
    return True


def settings_unknown(run: Run) -> bool:
    """Return whether a run was taken from files without a recipe."""
    return (run.folder / SETTINGS_UNKNOWN).exists()


def _file(run: Run, results: Path, name: str) -> Path:
    return results / f"{run.name}-seed{run.seed}-{name}"


def _public(start: Mapping[str, Any]) -> dict[str, Any]:
    """Return what others need of a start, without its command and with only the kind of its
    system: these name folders and versions of one machine."""
    machine = dict(start["machine"])
    if "system" in machine:
        machine["system"] = machine["system"].partition("-")[0]
    return {**{k: v for k, v in start.items() if k != "command"}, "machine": machine}


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}


def _write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    replace_text(file, "".join(json.dumps(row) + "\n" for row in rows))
