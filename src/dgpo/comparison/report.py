"""What a comparison writes: table.md, table.json, compare.png, compare.html and commands.txt."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from dgpo.comparison.figures import Record, Summary, read_record, summarize
from dgpo.comparison.picture import draw
from dgpo.comparison.plan import Run, lag
from dgpo.comparison.results_store import settings_unknown
from dgpo.comparison.runs import read_machines, state
from dgpo.comparison.table import Table, as_json, notes, tables
from dgpo.run.manifest import facts

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
small { color: #666; white-space: nowrap; } td { white-space: nowrap; }
img { max-width: 100%; } pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; }
div { overflow-x: auto; }
"""


@dataclass(frozen=True)
class Comparison:
    """What was asked for.

    Args:
        runs: all, those that are still to be made too.
        targets: held-out scores, in rising order.
        stop_at: the score that ends a run early, or None.
        command: what was typed.
        out: the folder.
        results: where the measurements of finished runs are kept, and taken from; or None.
        train: whether runs that are not finished are made.
    """

    runs: Sequence[Run]
    targets: Sequence[float]
    stop_at: float | None
    command: str
    out: Path
    results: Path | None = None
    train: bool = True


def write(comparison: Comparison) -> list[Summary]:
    """Write all files from the runs that there are; may be repeated.

    Returns:
        The figures; none if there is no evaluation yet.
    """
    out = comparison.out
    out.mkdir(parents=True, exist_ok=True)
    commands = _commands(comparison)
    (out / "commands.txt").write_text(commands, encoding="utf-8")
    recipes = _records(comparison)
    if not recipes:
        return []
    summaries = summarize(recipes, comparison.targets)
    metric = next(iter(summaries[0].records[0].points[0].metrics))
    machines = _machines(comparison)
    made, remarks = tables(summaries, metric), [*notes(summaries), *_remarks(comparison, machines)]
    versions = facts()["versions"]
    made_on = _made_on(machines, versions)
    draw(summaries, comparison.targets, metric, out / "compare.png")
    text = [f"# {metric} on held-out prompts", "", *(table.markdown() for table in made)]
    text += [f"{remark}\n" for remark in remarks]
    text += [
        f"![curves](compare.png)\n\nMade with:\n\n```\n{comparison.command}\n```\n",
        made_on,
        "",
    ]
    (out / "table.md").write_text("\n".join(text), encoding="utf-8")
    body = {
        "metric": metric,
        "targets": list(comparison.targets),
        "recipes": [as_json(summary) for summary in summaries],
        "machines": machines,
        "versions": versions,
        "command": comparison.command,
    }
    (out / "table.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    page = _page(metric, made, remarks, out / "compare.png", commands, made_on)
    (out / "compare.html").write_text(page, encoding="utf-8")
    return summaries


def _records(comparison: Comparison) -> dict[str, tuple[str, list[Record]]]:
    """The runs that have an evaluation, by recipe."""
    found: dict[str, tuple[str, list[Record]]] = {}
    for run in comparison.runs:
        here = state(run, comparison.stop_at)
        if here == "new":
            continue
        record = read_record(run.folder, run.seed, here == "finished")
        if record.points:
            own = found.setdefault(run.name, (run.recipe.algorithm.name, []))
            own[1].append(record)
    order = dict.fromkeys(run.name for run in comparison.runs)
    return {name: found[name] for name in order if name in found}


def _remarks(comparison: Comparison, machines: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know of the runs before comparing them."""
    made = [run for run in comparison.runs if run.folder.exists()]
    unknown = [f"{run.name} seed {run.seed}" for run in made if settings_unknown(run)]
    lags = {run.name: lag(run.recipe) for run in made if not settings_unknown(run)}
    lines: list[str] = []
    if lags:
        warm = {run.name for run in made if run.recipe.ema.warmup}
        named = ", ".join(
            f"{name} {iterations:.3g}{' (less at first)' if name in warm else ''}"
            for name, iterations in lags.items()
        )
        lines.append(
            "Scored is the slow average of the weights (ema); the iterations by which it lags "
            f"behind the policy: {named}."
        )
    if unknown:
        lines.append(f"The settings of these runs were not kept: {', '.join(unknown)}.")
    if len(machines) > 1:
        lines.append("The runs were made on different machines: their times do not compare.")
    return lines


def _commands(comparison: Comparison) -> str:
    lines = ["# the comparison", comparison.command, "", "# its runs, each on its own"]
    if comparison.stop_at is not None:
        lines[-1] += (
            f"; in the comparison a run ends once two evaluations in a row reach "
            f"{comparison.stop_at:g}"
        )
    return "\n".join([*lines, *(run.command for run in comparison.runs), ""])


def _machines(comparison: Comparison) -> list[dict[str, Any]]:
    """All that the runs were made on; this one if that was not noted."""
    every = [each for run in comparison.runs for each in read_machines(run.folder)]
    found = [each for place, each in enumerate(every) if each not in every[:place]]
    return found or [
        {**facts()["machine"], "note": "the machine of this report; the runs' was not noted"}
    ]


def _made_on(machines: Sequence[dict[str, Any]], versions: dict[str, str | None]) -> str:
    lines = ["; ".join(f"{key}: {value}" for key, value in each.items()) for each in machines]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    return "\n".join([*(f"Machine: {line}." for line in lines), "", f"Versions: {packages}."])


def _page(
    metric: str,
    made: Sequence[Table],
    remarks: Sequence[str],
    picture: Path,
    commands: str,
    made_on: str,
) -> str:
    """A page that needs no other file."""
    data = base64.b64encode(picture.read_bytes()).decode()
    title = escape(f"{metric} on held-out prompts")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        f'<img alt="score against cost" src="data:image/png;base64,{data}">',
        *map(_html, made),
        *(f"<p>{escape(remark)}</p>" for remark in remarks),
        f"<h2>Commands</h2><pre>{escape(commands)}</pre>",
        "<h2>Machine and versions</h2>",
        *(f"<p>{escape(line)}</p>" for line in made_on.splitlines() if line),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _html(table: Table) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in table.header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_two_lines(text)}</td>" for text in row) + "</tr>"
        for row in table.rows
    )
    return (
        f"<h2>{escape(table.title)}</h2><div><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _two_lines(text: str) -> str:
    """A figure, and below it what stands in brackets."""
    value, bracket, rest = text.partition(" [" if " [" in text else " (")
    below = f"<br><small>{escape(bracket.strip() + rest)}</small>" if rest else ""
    return escape(value) + below
