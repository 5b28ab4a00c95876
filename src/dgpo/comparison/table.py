"""Write the figures of a comparison as tables and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from dgpo.comparison.figures import COSTS, PHASES, Figure, Record, Summary

TITLES = {
    "minutes": "training minutes",
    "images": "images",
    "forwards": "denoiser forwards",
    "backwards": "denoiser backwards",
}


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table in Markdown, below its title."""
        ruler = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [" | ".join(row) for row in (self.header, ruler, *self.rows)]
        return "\n".join([f"## {self.title}", "", *(f"| {line} |" for line in lines), ""])


def tables(summaries: Sequence[Summary], metric: str) -> list[Table]:
    """Return a table for each target, one of the best scores, and one of an iteration's costs.

    Args:
        summaries: the figures of all recipes; ratios are over the first recipe's.
        metric: the name of the held-out score.
    """
    made = [_target(summaries, metric, target) for target in summaries[0].to_target]
    return [*made, _scores(summaries, metric), _iterations(summaries)]


def notes(summaries: Sequence[Summary]) -> list[str]:
    """Say how to read the tables."""
    gaps = [f"{summary.name} {_widest_gap(summary.records):.1f}" for summary in summaries]
    lines = [
        "Figures are means over seeds. Brackets hold Student's 95% interval over seeds, or the two "
        "values of two seeds. Training time, images and denoiser passes are those of rollouts, "
        "rewards and updates; evaluations do not count. A denoiser pass is one sample: guidance "
        "costs two, snapshots and training passes count, and backward passes are apart.",
        "A run arrives at a target with its first evaluation at or above it; nothing is "
        f"interpolated. Ratios are over the costs of {summaries[0].name}: geometric means over "
        "seeds. Where a run has not arrived by its end, its cost until then is a lower bound, "
        'written ">="; a ratio over a run that has not arrived is an upper bound, "<=".',
        "This rounds an arrival up to the next evaluation, by up to so many minutes: "
        f"{', '.join(gaps)}.",
        "The other metrics' changes are from the base model to the evaluation with the best score.",
        "An iteration shows the means over seeds of each run's median time and mean counts.",
    ]
    partial = [
        f"{summary.name} seed {run.seed}"
        for summary in summaries
        for run in summary.records
        if not run.finished
    ]
    if partial:
        lines.append(f"Not finished: {', '.join(partial)}.")
    return lines


def cell(figure: Figure, digits: int | None = None, sign: bool = False) -> str:
    """Write a figure as text; a bound is never rounded to say more than is known.

    Args:
        figure: the figure.
        digits: the digits after the point; None for three significant digits.
        sign: whether to write a plus.

    >>> cell(Figure(19.99, bound="at least"))
    '>= 19.9'
    """
    if figure.value is None:
        return "not known"
    if figure.bound != "exact":
        shown = _number(figure.value, digits, sign, -1 if figure.bound == "at least" else 1)
        text = f"{'>=' if figure.bound == 'at least' else '<='} {shown}"
        if figure.arrived is not None:
            text += f" ({figure.arrived} of {figure.seeds} arrived)"
        return text
    text = _number(figure.value, digits, sign)
    if figure.low is None or figure.high is None:
        return text
    return f"{text} [{_number(figure.low, digits, sign)}, {_number(figure.high, digits, sign)}]"


def as_json(summary: Summary) -> dict[str, Any]:
    """Return everything that is known of a recipe; ``json.dumps`` needs ``default=asdict``."""
    to_target, ratios = (
        {f"{target:g}": costs for target, costs in figures.items()}
        for figures in (summary.to_target, summary.ratios)
    )
    runs = [
        {"seed": run.seed, "finished": run.finished, "best": run.best, "evaluations": run.points}
        for run in summary.records
    ]
    return {
        "name": summary.name,
        "algorithm": summary.algorithm,
        "best_score": summary.best,
        "change_at_best": summary.change,
        "to_target": to_target,
        "ratio_to_first": ratios,
        "runs": runs,
    }


def _target(summaries: Sequence[Summary], metric: str, target: float) -> Table:
    costs = [cost for cost in COSTS if cost != "backwards"]
    header = ["recipe"]
    for cost in costs:
        header += [TITLES[cost], "ratio"]
    header.append(TITLES["backwards"])
    rows = []
    for summary in summaries:
        row = [summary.name]
        for cost in costs:
            own = summary is summaries[0] and summary.ratios[target][cost].value is not None
            ratio = "1" if own else cell(summary.ratios[target][cost])
            row += [cell(summary.to_target[target][cost]), ratio]
        rows.append([*row, cell(summary.to_target[target]["backwards"])])
    return Table(f"Cost to {metric} {target:g}", header, rows)


def _scores(summaries: Sequence[Summary], metric: str) -> Table:
    others = list(dict.fromkeys(name for summary in summaries for name in summary.change))
    header = ["recipe", "seeds", "training minutes", f"best {metric}"]
    header += [f"change of {name}" for name in others]
    rows = []
    for summary in summaries:
        spent = [run.points[-1].cost["minutes"] or 0.0 for run in summary.records]
        most = f"{min(spent):.1f} to {max(spent):.1f}" if len(spent) > 1 else f"{spent[0]:.1f}"
        changes = [cell(summary.change.get(name, Figure(None)), 3, sign=True) for name in others]
        row = [summary.name, str(len(spent)), most, cell(summary.best, 3), *changes]
        rows.append(row)
    return Table("Best scores", header, rows)


def _iterations(summaries: Sequence[Summary]) -> Table:
    titles = ["seconds", "rollouts", "rewards", "update"]
    header = ["recipe", *titles, *(TITLES[cost] for cost in COSTS[1:])]
    rows = []
    for summary in summaries:
        records = summary.records
        times = [[run.phases[name] for run in records if name in run.phases] for name in PHASES]
        ends = [run.points[-1] for run in records if run.points[-1].iteration]
        counts = [
            [value / end.iteration for end in ends if (value := end.cost[cost]) is not None]
            for cost in COSTS[1:]
        ]
        cells = [cell(Figure(fmean(found) if found else None)) for found in (*times, *counts)]
        rows.append([summary.name, *cells])
    return Table("An iteration", header, rows)


def _widest_gap(records: Sequence[Record]) -> float:
    """Return the longest training time between two evaluations, in minutes."""
    times = [[point.cost["minutes"] or 0.0 for point in run.points] for run in records]
    return max((b - a for own in times for a, b in pairwise(own)), default=0.0)


def _number(value: float, digits: int | None, sign: bool, towards: int = 0) -> str:
    """Round a number to the nearest (``towards`` 0), down (-1) or up (1), and write it."""
    if digits is None:
        size = math.floor(math.log10(abs(value))) if value else 0
        digits = 2 - size
    scale = 10.0**digits
    # 0.1 + 0.2 = 0.30000000000000004 is no reason to round up to 0.301
    scaled = round(value * scale, 6)
    rounded = {-1: math.floor, 0: round, 1: math.ceil}[towards](scaled) / scale
    return f"{rounded:{'+' if sign else ''},.{max(0, digits)}f}"
