"""Work out what runs show: the cost to a target, the best scores, and intervals over seeds.

A run arrives at a target with its first evaluation at or above it; nothing is interpolated. A run
that has not arrived costs at least what it had cost at its last evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, Literal

from dgpo.run.tracking import read_jsonl

COSTS = ("minutes", "images", "forwards", "backwards")
"""Training time; pictures; samples through the denoiser forwards; and backwards."""
PHASES = ("seconds_iteration", "seconds_rollout", "seconds_reward", "seconds_train")
"""The seconds of an iteration: in all, for sampling, for the rewards, for the update."""


@dataclass(frozen=True)
class Point:
    """An evaluation, and what training had cost by then.

    Args:
        iteration: the iterations done; 0 for the base model.
        score: the held-out score.
        metrics: all metrics; the first is the score.
        cost: the cost by :data:`COSTS`; None where the run did not count it.
    """

    iteration: int
    score: float
    metrics: dict[str, float]
    cost: dict[str, float | None]


@dataclass(frozen=True)
class Record:
    """The evaluations of a run.

    Args:
        seed: the run's seed.
        points: its evaluations in order; there is one at least.
        finished: whether the run has ended.
        phases: medians over its iterations, by those of :data:`PHASES` that the run noted.
    """

    seed: int
    points: list[Point]
    finished: bool = True
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> Point:
        """The first evaluation with the highest score."""
        return max(self.points, key=lambda point: point.score)

    def arrival(self, target: float) -> Point | None:
        """Return the first evaluation at or above a target, if there is one."""
        return next((point for point in self.points if point.score >= target), None)


@dataclass(frozen=True)
class Figure:
    """A mean over seeds with its interval (:func:`mean`), or a bound of the mean.

    Args:
        value: the mean or bound; None where nothing can be said.
        low, high: the ends of the interval, if there is one.
        bound: whether the value is exact or a bound.
        seeds: the number of seeds.
        arrived: how many of them reached the target, if there is one.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    bound: Literal["exact", "at least", "at most"] = "exact"
    seeds: int = 0
    arrived: int | None = None


@dataclass(frozen=True)
class Summary:
    """All figures of a recipe.

    Args:
        name: the recipe's name.
        algorithm: the name of its algorithm.
        records: its runs.
        to_target: the cost to each target, by :data:`COSTS`.
        ratios: these costs over those of the comparison's first recipe.
        best: the best score.
        change: how the other metrics changed from the base model to the evaluation with the best
            score.
    """

    name: str
    algorithm: str
    records: list[Record]
    to_target: dict[float, dict[str, Figure]] = field(default_factory=dict)
    ratios: dict[float, dict[str, Figure]] = field(default_factory=dict)
    best: Figure = Figure(None)
    change: dict[str, Figure] = field(default_factory=dict)


def read_record(folder: Path, seed: int, finished: bool = True) -> Record:
    """Read the evaluations of a run folder, with the costs in its ``metrics.jsonl``."""
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
    """Return the figures of all recipes.

    Args:
        recipes: the algorithm and records of each recipe by its name; ratios are over the costs of
            the first recipe.
        targets: held-out scores.
    """
    summaries, base = [], list(next(iter(recipes.values()))[1])
    for name, (algorithm, records) in recipes.items():
        costs = {t: {c: to_target(records, t, c) for c in COSTS} for t in targets}
        ratios = {t: {c: ratio(records, base, t, c) for c in COSTS} for t in targets}
        best = [run.best.score for run in records]
        summaries.append(
            Summary(name, algorithm, list(records), costs, ratios, mean(best), _changes(records))
        )
    return summaries


def mean(values: Sequence[float], least: float = -math.inf) -> Figure:
    """Return the mean and Student's 95% interval.

    For two values that interval says next to nothing, so the two values are given instead. One
    value has no interval, and no value has no mean.

    Args:
        values: one value for each seed.
        least: the least possible value.

    >>> mean([1.0, 3.0])
    Figure(value=2.0, low=1.0, high=3.0, bound='exact', seeds=2, arrived=None)
    """
    if not values:
        return Figure(None)
    middle, count = fmean(values), len(values)
    if count == 1:
        return Figure(middle, seeds=1)
    if count == 2:
        return Figure(middle, min(values), max(values), seeds=2)
    from scipy.special import stdtrit

    half = float(stdtrit(count - 1, 0.975)) * stdev(values) / math.sqrt(count)
    return Figure(middle, max(least, middle - half), middle + half, seeds=count)


def to_target(records: Sequence[Record], target: float, cost: str) -> Figure:
    """Return the mean cost to a target, or a bound of it where a seed has not arrived."""
    ends = [_end(run, target, cost) for run in records]
    values = [value for value, _ in ends if value is not None]
    count = sum(there for _, there in ends)
    if len(values) < len(ends) or not values:
        return Figure(None, seeds=len(ends), arrived=count)
    if count == len(ends):
        return replace(mean(values, least=0), arrived=count)
    return Figure(fmean(values), bound="at least", seeds=len(ends), arrived=count)


def ratio(records: Sequence[Record], base: Sequence[Record], target: float, cost: str) -> Figure:
    """Return the cost to a target over that of ``base``, as a geometric mean over common seeds.

    It is a lower bound where a run of ``records`` has not arrived, and an upper bound where a run
    of ``base`` has not. Where neither has arrived nothing can be said.
    """
    below = {run.seed: _end(run, target, cost) for run in base}
    pairs = [(_end(run, target, cost), below[run.seed]) for run in records if run.seed in below]
    if not pairs or any(not value for pair in pairs for value, _ in pair):
        return Figure(None, seeds=len(pairs))
    open_above = any(not there for (_, there), _ in pairs)
    open_below = any(not there for _, (_, there) in pairs)
    logs = [math.log(above / under) for (above, _), (under, _) in pairs if above and under]
    if open_above and open_below:
        return Figure(None, seeds=len(logs))
    if open_above or open_below:
        bound = "at least" if open_above else "at most"
        return Figure(math.exp(fmean(logs)), bound=bound, seeds=len(logs))
    found = mean(logs)
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Figure(math.exp(fmean(logs)), low, high, seeds=len(logs))


def _end(run: Record, target: float, cost: str) -> tuple[float | None, bool]:
    """Return the cost at which a run arrived, or ended, and whether it arrived."""
    there = run.arrival(target)
    return (there or run.points[-1]).cost[cost], there is not None


def _changes(records: Sequence[Record]) -> dict[str, Figure]:
    values: dict[str, list[float]] = {}
    for run in records:
        if run.points[0].iteration != 0:
            continue  # the base model was not evaluated
        base, best = run.points[0].metrics, run.best.metrics
        for name in list(base)[1:]:
            if name in best:
                values.setdefault(name, []).append(best[name] - base[name])
    return {name: mean(found) for name, found in values.items()}
