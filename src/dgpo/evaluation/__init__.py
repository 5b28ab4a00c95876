"""Evaluation on held-out prompts: seeded per prompt, by category, with confidence intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dgpo.models.pipeline import PipelineModel
from dgpo.prompts import Prompt
from dgpo.registry import resolve
from dgpo.rewards import load_rewards


class Interval(NamedTuple):
    """A figure and its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Args:
        benchmark: its name, or the source of the prompts.
        overall: mean of the first metric over the categories (equal weight each).
        categories: the first metric by category (a row's ``tag``).
        rewards: every metric's mean over all pictures.
        n: pictures scored.
        ci95: interval of ``overall``.
        intervals: interval of every metric.
    """

    benchmark: str
    overall: float
    categories: dict[str, float]
    rewards: dict[str, float]
    n: int
    ci95: tuple[float, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def write(self, file: Path | str) -> None:
        Path(file).write_text(json.dumps(asdict(self), indent=2) + "\n")


@dataclass(frozen=True)
class Sampling:
    """How the pictures of an evaluation are made."""

    steps: int = 10
    guidance_scale: float = 1.0
    scheduler: Any = None
    batch: int = 256


def sample_images(
    model: PipelineModel, prompts: Sequence[Prompt], sampling: Sampling, seed: int = 0
) -> list[Image.Image]:
    """One picture for each prompt row, in order.

    A row's noise is seeded by its own ``seed`` column, or by ``seed`` plus its position, so a
    picture does not depend on the batch it was made in.
    """
    images: list[Image.Image] = []
    for start in range(0, len(prompts), sampling.batch):
        rows = prompts[start : start + sampling.batch]
        seeds = [
            int(row.metadata.get("seed", seed + start + index)) for index, row in enumerate(rows)
        ]
        cond = model.encode([row.text for row in rows], guidance=sampling.guidance_scale != 1.0)
        rollout = model.rollout(
            cond,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            scheduler=sampling.scheduler,
            generators=[torch.Generator().manual_seed(s) for s in seeds],
        )
        assert rollout.images is not None
        images += rollout.images
    return images


def evaluate(
    model: PipelineModel,
    prompts: Sequence[Prompt],
    metrics: Sequence[str | Callable],
    sampling: Sampling,
    name: str = "prompts",
) -> tuple[Report, list[Image.Image]]:
    """Sample every prompt once and score the pictures.

    Args:
        model: the pipeline, with the weights to be judged in place.
        prompts: held-out rows; the column ``tag``, if any, is the category.
        metrics: reward names or functions.  A metric with the attribute ``of_set`` true is called
            once, ``(images, prompts, **columns) -> Interval``.
        sampling: how to sample.
        name: what the report calls the benchmark.

    Returns:
        The report and the pictures.
    """
    images = sample_images(model, prompts, sampling)
    return score(images, prompts, metrics, name), images


def score(
    images: list[Image.Image],
    prompts: Sequence[Prompt],
    metrics: Sequence[str | Callable],
    name: str = "images",
) -> Report:
    """Score pictures that exist already; see :func:`evaluate`."""
    found = [resolve("reward", m) if isinstance(m, str) else m for m in metrics]
    titles = [m if isinstance(m, str) else getattr(m, "__name__", "metric") for m in metrics]
    single = {t: m for t, m in zip(titles, found) if not getattr(m, "of_set", False)}
    values = load_rewards([m if isinstance(m, str) else f for m, f in zip(metrics, found)
                           if not getattr(f, "of_set", False)])(images, prompts).by_name
    tags = [str(row.metadata.get("tag", "all")) for row in prompts]
    results: dict[str, Interval] = {}
    for title, metric in zip(titles, found):
        if title in single:
            results[title] = stratified_mean(values[title], tags)
        else:
            results[title] = Interval(*metric(images, [p.text for p in prompts]))
    first = titles[0]
    overall = results[first]
    categories = {
        tag: float(values[first][[t == tag for t in tags]].mean())
        for tag in dict.fromkeys(tags)
    } if first in values else {}
    return Report(
        benchmark=name,
        overall=overall.value,
        categories=categories,
        rewards={title: r.value for title, r in results.items()},
        n=len(images),
        ci95=(overall.low, overall.high),
        intervals={title: (r.low, r.high) for title, r in results.items()},
    )


def stratified_mean(values: Tensor, tags: Sequence[str]) -> Interval:
    """Mean of the categories' means and its normal 95% interval.

    The variance is ``sum_c s_c^2 / n_c / C^2`` with the categories' sample variances ``s_c^2``.

    Args:
        values: [N], one number a picture.
        tags: the category of each, N of them.
    """
    kinds = list(dict.fromkeys(tags))
    means, variance = [], 0.0
    for kind in kinds:
        part = values[[t == kind for t in tags]].double()
        means.append(float(part.mean()))
        if len(part) > 1:
            variance += float(part.var()) / len(part)
    mean = sum(means) / len(kinds)
    half = 1.96 * math.sqrt(variance) / len(kinds)
    return Interval(mean, mean - half, mean + half)
