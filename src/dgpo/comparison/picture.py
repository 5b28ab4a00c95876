"""Draw compare.png: the held-out score against time, against pictures and against passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgpo.comparison.figures import Record, Summary
from dgpo.comparison.table import TITLES

PANELS = ("minutes", "images", "forwards")
WIDE = 8
"""The axes are logarithmic where the recipes' costs differ by this factor or more."""


def draw(summaries: Sequence[Summary], targets: Sequence[float], metric: str, file: Path) -> None:
    """Draw the three panels.

    A recipe's line is the mean over its seeds as far as all of them go. A band goes from the lowest
    to the highest. Thin lines are single seeds, with a dot for each evaluation.
    """
    # unlike pyplot, this interface needs no display and has no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.2), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    lines = {
        cost: [[_line(run, cost) for run in own.records] for own in summaries] for cost in PANELS
    }
    ends = {
        cost: [x[-1] for recipe in made for x, _ in recipe if len(x) and x[-1] > 0]
        for cost, made in lines.items()
    }
    logarithmic = any(found and max(found) >= WIDE * min(found) for found in ends.values())
    for panel, cost in zip(panels, PANELS, strict=True):
        panel.set(xlabel=TITLES[cost])
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if not ends[cost]:
            panel.text(0.5, 0.5, "not counted", ha="center", transform=panel.transAxes)
            continue
        _axis(panel, cost, logarithmic)
        _levels(panel, summaries, targets)
        for place, (summary, recipe) in enumerate(zip(summaries, lines[cost], strict=True)):
            # a logarithmic axis has no place for the base model, which has cost nothing
            first = int(logarithmic)
            shown = [(x[first:], y[first:]) for x, y in recipe if len(x) > first]
            look = {"color": f"C{place % 10}", "linestyle": ("-", "--", ":")[place // 10 % 3]}
            _recipe(panel, summary.name, shown, look)
    panels[0].set_ylabel(f"held-out {metric}")
    handles, labels = panels[0].get_legend_handles_labels()
    columns = min(5, len(labels) or 1)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(file, dpi=120)


def _axis(panel: Any, cost: str, logarithmic: bool) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

    if logarithmic:
        panel.set_xscale("log")
        panel.set_xlabel(f"{TITLES[cost]} (logarithmic)")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_minor_formatter(NullFormatter())
    numbers = StrMethodFormatter("{x:g}") if cost == "minutes" else EngFormatter(sep="")
    panel.xaxis.set_major_formatter(numbers)


def _recipe(panel: Any, name: str, lines: Sequence[Any], look: Mapping[str, str]) -> None:
    if not lines:
        return
    if len(lines) == 1:
        x, y = lines[0]
        panel.plot(x, y, linewidth=2, marker=".", label=name, **look)
        return
    for x, y in lines:
        panel.plot(x, y, linewidth=0.8, alpha=0.5, marker=".", markersize=4, **look)
    first, last = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    grid = np.unique(np.concatenate([x for x, _ in lines]))
    grid = grid[(grid >= first) & (grid <= last)]
    if not len(grid):
        panel.plot([], [], linewidth=2, label=name, **look)
        return
    scores = np.stack([np.interp(grid, x, y) for x, y in lines])
    low, high = scores.min(0), scores.max(0)
    panel.fill_between(grid, low, high, color=look["color"], alpha=0.18, linewidth=0)
    panel.plot(grid, scores.mean(0), linewidth=2, label=name, **look)


def _levels(panel: Any, summaries: Sequence[Summary], targets: Sequence[float]) -> None:
    """Draw lines at the targets, and at the base model's score."""
    for target in targets:
        panel.axhline(target, color="0.4", linewidth=0.8, linestyle=(0, (4, 3)))
        where = {"transform": panel.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        panel.text(0.995, target, f"{target:g}", fontsize="small", color="0.4", **where)
    runs = [run for summary in summaries for run in summary.records]
    base = [run.points[0].score for run in runs if run.points[0].iteration == 0]
    if base:
        panel.axhline(float(np.mean(base)), color="0.6", linewidth=0.8, linestyle=":")


def _line(run: Record, cost: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(p.cost[cost], p.score) for p in run.points if p.cost[cost] is not None]
    both = np.asarray(pairs, float).reshape(-1, 2)
    return both[:, 0], both[:, 1]
