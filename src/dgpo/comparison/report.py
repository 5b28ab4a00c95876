"""Write table.md, table.json, compare.png, compare.html and commands.txt of a comparison."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from dgpo.comparison.figures import Record, Summary, read_record, summarize
from dgpo.comparison.picture import draw
from dgpo.comparison.plan import Run, lag
from dgpo.comparison.results_store import settings_unknown
from dgpo.comparison.runs import starts_of, state
from dgpo.comparison.table import Table, as_json, notes, tables
from dgpo.disk import replace_text
from dgpo.run.manifest import facts

PAGE = Path(__file__).with_name("page.html")
"""The frame of compare.html, a page that needs no other file."""


@dataclass(frozen=True)
class Comparison:
    """What the user asked for.

    Args:
        runs: all runs, including those that are not made yet.
        targets: held-out scores, in rising order.
        stop_at: the score that ends a run early, or None.
        command: the command that was typed.
        out: the folder of the comparison.
        results: where the measurements of finished runs are kept and taken from, or None.
        train: whether to make the runs that are not finished.
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
        The figures of each recipe; none if there is no evaluation yet.
    """
    out = comparison.out
    out.mkdir(parents=True, exist_ok=True)
    commands = _commands(comparison)
    replace_text(out / "commands.txt", commands)
    recipes = _records(comparison)
    if not recipes:
        return []
    summaries = summarize(recipes, comparison.targets)
    metric = next(iter(summaries[0].records[0].points[0].metrics))
    draw(summaries, comparison.targets, metric, out / "compare.png")
    machines, versions = _machines(comparison), facts()["versions"]
    body = {
        "metric": metric,
        "targets": list(comparison.targets),
        "recipes": [as_json(summary) for summary in summaries],
        "machines": machines,
        "versions": versions,
        "command": comparison.command,
    }
    replace_text(out / "table.json", json.dumps(body, indent=1, default=asdict) + "\n")
    title, made = f"{metric} on held-out prompts", tables(summaries, metric)
    remarks = [*notes(summaries), *_remarks(comparison, machines)]
    made_on = _made_on(machines, versions)
    text = [f"# {title}", "", *(table.markdown() for table in made)]
    text += [f"{remark}\n" for remark in remarks]
    text += ["![curves](compare.png)\n", f"Made with:\n\n```\n{comparison.command}\n```\n"]
    replace_text(out / "table.md", "\n".join([*text, *made_on[:-1], "", made_on[-1], ""]))
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        picture=base64.b64encode((out / "compare.png").read_bytes()).decode(),
        tables="\n".join(map(_html, made)),
        remarks=_paragraphs(remarks),
        commands=escape(commands),
        made_on=_paragraphs(made_on),
    )
    replace_text(out / "compare.html", page)
    return summaries


def _records(comparison: Comparison) -> dict[str, tuple[str, list[Record]]]:
    """Read the runs that have an evaluation: the algorithm and the records of each recipe."""
    found: dict[str, tuple[str, list[Record]]] = {}
    for run in comparison.runs:
        here = state(run, comparison.stop_at)
        if here == "new":
            continue
        record = read_record(run.folder, run.seed, here == "finished")
        if record.points:
            found.setdefault(run.name, (run.recipe.algorithm.name, []))[1].append(record)
    order = dict.fromkeys(run.name for run in comparison.runs)
    return {name: found[name] for name in order if name in found}


def _remarks(comparison: Comparison, machines: Sequence[Mapping[str, Any]]) -> list[str]:
    """List what a reader must know about the runs before comparing them."""
    made = [run for run in comparison.runs if run.folder.exists()]
    unknown = [f"{run.name} seed {run.seed}" for run in made if settings_unknown(run)]
    known = {run.name: run.recipe for run in made if not settings_unknown(run)}
    lines: list[str] = []
    if known:
        lags = ", ".join(
            f"{name} {lag(recipe):.3g}{' (less at first)' if recipe.ema.warmup else ''}"
            for name, recipe in known.items()
        )
        lines.append(
            "The slow average of the weights (ema) is scored; it lags behind the policy by so many "
            f"iterations: {lags}."
        )
    if unknown:
        lines.append(f"The settings of these runs were not kept: {', '.join(unknown)}.")
    if len(machines) > 1:
        lines.append("The runs were made on different machines: do not compare their times.")
    return lines


def _commands(comparison: Comparison) -> str:
    title = "# its runs, each on its own"
    if comparison.stop_at is not None:
        title += (
            "; in the comparison a run ends once two evaluations in a row reach "
            f"{comparison.stop_at:g}"
        )
    runs = [run.command for run in comparison.runs]
    return "\n".join(["# the comparison", comparison.command, "", title, *runs, ""])


def _machines(comparison: Comparison) -> list[dict[str, Any]]:
    """List the machines of all runs, or this machine where the runs do not name theirs."""
    every = [start["machine"] for run in comparison.runs for start in starts_of(run.folder)]
    found = [each for place, each in enumerate(every) if each not in every[:place]]
    return found or [
        {**facts()["machine"], "note": "the machine of this report; the runs' was not noted"}
    ]


def _made_on(machines: Sequence[Mapping[str, Any]], versions: Mapping[str, Any]) -> list[str]:
    lines = ["; ".join(f"{key}: {value}" for key, value in each.items()) for each in machines]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    return [*(f"Machine: {line}." for line in lines), f"Versions: {packages}."]


def _paragraphs(lines: Sequence[str]) -> str:
    return "\n".join(f"<p>{escape(line)}</p>" for line in lines)


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
    """Put what stands in brackets below the figure."""
    value, bracket, rest = text.partition(" [" if " [" in text else " (")
    below = f"<br><small>{escape(bracket.strip() + rest)}</small>" if rest else ""
    return escape(value) + below
