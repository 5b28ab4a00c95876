"""What the runs of a comparison show: cost to a target, best scores, and intervals over seeds.

A run arrives at a target with its first evaluation at or above it; nothing is interpolated. A run
that has not arrived has cost at least what it had cost at its last evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, Literal

from dgpo.run.tracking import read_jsonl

COSTS = ("minutes", "images", "forwards", "backwards")
"""Training time; pictures; samples that a denoiser evaluated; samples it was differentiated for."""
PHASES = ("seconds_iteration", "seconds_rollout", "seconds_reward", "seconds_train")
"""Of an iteration: all of it; sampling; the rewards; the update."""


@dataclass(frozen=True)
class Point:
    """One evaluation and what training had cost by then."""

    iteration: int
    score: float
    metrics: dict[str, float]
    """All metrics; the first is the score."""
    cost: dict[str, float | None]
    """By :data:`COSTS`; None where a run did not count."""


@dataclass(frozen=True)
class Record:
    """The evaluations of one run."""

    seed: int
    points: list[Point]
    finished: bool = True
    phases: dict[str, float] = field(default_factory=dict)
    """Medians over the iterations, by :data:`PHASES`; without those that a run did not note."""

    @property
    def best(self) -> Point | None:
        """The first of the highest scores."""
        return max(self.points, key=lambda point: point.score, default=None)

    def arrival(self, target: float) -> Point | None:
        return next((point for point in self.points if point.score >= target), None)


@dataclass(frozen=True)
class Figure:
    """A mean over seeds with its interval (:func:`mean`), or a bound of it."""

    value: float | None
    """None: nothing can be said."""
    low: float | None = None
    high: float | None = None
    bound: Literal["exact", "at least", "at most"] = "exact"
    seeds: int = 0
    arrived: int | None = None
    """Seeds that reached the target, where there is one."""


@dataclass(frozen=True)
class Summary:
    """All figures of one recipe."""

    name: str
    algorithm: str
    records: list[Record]
    to_target: dict[float, dict[str, Figure]] = field(default_factory=dict)
    ratios: dict[float, dict[str, Figure]] = field(default_factory=dict)
    """Cost to a target over that of the comparison's first recipe."""
    best: Figure = Figure(None)
    change: dict[str, Figure] = field(default_factory=dict)
    """Of the other metrics, from the base model to the evaluation with the best score."""


def read_record(folder: Path, seed: int, finished: bool = True) -> Record:
    """The evaluations of a run folder, with the costs of its ``metrics.jsonl``."""
    rows = {row["iteration"]: row for row in read_jsonl(folder / "metrics.jsonl")}
    nothing: dict[str, Any] = dict.fromkeys(COSTS, 0)
    points = []
    for row in read_jsonl(folder / "evaluations.jsonl"):
        spent = rows.get(row["iteration"], {}) if row["iteration"] else nothing
        cost: dict[str, float | None] = {name: spent.get(name) for name in COSTS}
        cost["minutes"] = row["seconds"] / 60
        points.append(Point(row["iteration"], row["overall"], row["rewards"], cost))
    noted = {name: [row[name] for row in rows.values() if name in row] for name in PHASES}
    phases = {name: median(found) for name, found in noted.items() if found}
    return Record(seed, points, finished, phases)


def summarize(
    recipes: Mapping[str, tuple[str, Sequence[Record]]], targets: Sequence[float]
) -> list[Summary]:
    """The figures of all recipes.

    Args:
        recipes: name to algorithm and records; ratios are over the first one's costs.
        targets: held-out scores.
    """
    summaries, base = [], list(next(iter(recipes.values()))[1])
    for name, (algorithm, records) in recipes.items():
        costs = {t: {c: to_target(records, t, c) for c in COSTS} for t in targets}
        ratios = {t: {c: ratio(records, base, t, c) for c in COSTS} for t in targets}
        best = [run.best.score for run in records if run.best is not None]
        summaries.append(
            Summary(name, algorithm, list(records), costs, ratios, mean(best), _changes(records))
        )
    return summaries


def mean(values: Sequence[float], least: float = -math.inf) -> Figure:
    """Mean and Student's 95% interval; of two values, for which that says next to nothing, the two;
    of one value there is no interval, of none no mean.

    Args:
        values: one a seed.
        least: no value can be below it.
    """
    if not values:
        return Figure(None)
    middle, count = fmean(values), len(values)
    if count == 1:
        return Figure(middle, seeds=1)
    if count == 2:
        return Figure(middle, min(values), max(values), seeds=2)
    half = _student(count) * stdev(values) / math.sqrt(count)
    return Figure(middle, max(least, middle - half), middle + half, seeds=count)


def to_target(records: Sequence[Record], target: float, cost: str) -> Figure:
    """Mean cost to the target; a bound where a seed has not arrived."""
    ends = [_end(run, target, cost) for run in records]
    values = [value for value, _ in ends if value is not None]
    count = sum(there for _, there in ends)
    if len(values) < len(ends) or not values:
        return Figure(None, seeds=len(ends), arrived=count)
    if count == len(ends):
        found = mean(values, least=0)
        return Figure(found.value, found.low, found.high, seeds=count, arrived=count)
    return Figure(fmean(values), bound="at least", seeds=len(ends), arrived=count)


def ratio(records: Sequence[Record], base: Sequence[Record], target: float, cost: str) -> Figure:
    """Cost to the target over that of ``base``: geometric mean over the seeds that both have.

    Where a run above has not arrived it is a lower bound, where one below has not an upper bound,
    and where both are so, nothing.
    """
    below = {run.seed: _end(run, target, cost) for run in base}
    pairs = [(_end(run, target, cost), below[run.seed]) for run in records if run.seed in below]
    if not pairs or any(not value for pair in pairs for value, _ in pair):
        return Figure(None, seeds=len(pairs))
    open_above = any(not there for (_, there), _ in pairs)
    open_below = any(not there for _, (_, there) in pairs)
    logs = [math.log(_known(above) / _known(under)) for (above, _), (under, _) in pairs]
    if open_above and open_below:
        return Figure(None, seeds=len(logs))
    if open_above or open_below:
        bound = "at least" if open_above else "at most"
        return Figure(math.exp(fmean(logs)), bound=bound, seeds=len(logs))
    found = mean(logs)
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Figure(math.exp(fmean(logs)), low, high, seeds=len(logs))


def _end(run: Record, target: float, cost: str) -> tuple[float | None, bool]:
    """The cost at which the run arrived, or of all that it did; and whether it arrived."""
    there = run.arrival(target)
    point = there or (run.points[-1] if run.points else None)
    return (None if point is None else point.cost[cost]), there is not None


def _changes(records: Sequence[Record]) -> dict[str, Figure]:
    values: dict[str, list[float]] = {}
    for run in records:
        if run.best is None or run.points[0].iteration != 0:
            continue  # the base model was not measured
        base, best = run.points[0].metrics, run.best.metrics
        for name in list(base)[1:]:
            if name in best:
                values.setdefault(name, []).append(best[name] - base[name])
    return {name: mean(found) for name, found in values.items()}


def _student(count: int) -> float:
    """The 97.5% point of Student's distribution for ``count`` values."""
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, 0.975))


def _known(value: Any) -> float:
    assert value is not None
    return float(value)
