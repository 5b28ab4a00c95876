"""An evaluation samples held-out prompts with fixed seeds and scores the pictures, by category."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dgpo.distributed.assignment import Assignment
from dgpo.distributed.lockstep import turns
from dgpo.distributed.processes import SINGLE, Processes
from dgpo.errors import UserError
from dgpo.evaluation.gathering import each_of_all, lost_of_all, whole_of_all
from dgpo.evaluation.metrics import Interval, Metrics
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.prompts import Prompt


@dataclass(frozen=True)
class Report:
    """A ``Report`` holds what an evaluation found.

    Args:
        benchmark: the benchmark's name, or the source of the prompts.
        overall: the first metric, the mean over the categories, which count equally.
        categories: the first metric in each category (the ``tag`` of the rows).
        rewards: every metric, averaged as ``overall`` is.
        n: how many pictures were scored.
        ci95: the 95% confidence interval of ``overall``.
        intervals: the 95% confidence interval of every metric.
        lost: how many pictures could not be scored, and are in no figure.
    """

    benchmark: str
    overall: float
    categories: dict[str, float]
    rewards: dict[str, float]
    n: int
    ci95: tuple[float, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    lost: int = 0

    def write(self, file: Path | str) -> None:
        """Write everything but ``intervals`` as JSON."""
        body = asdict(self)
        del body["intervals"]
        Path(file).write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", "utf-8")


@dataclass(frozen=True)
class Sampling:
    """``Sampling`` says how the pictures of an evaluation are made.

    Args:
        steps: ``num_inference_steps``.
        guidance_scale: the guidance; 1 is none.
        scheduler: the sampler, an object of diffusers; None for the pipeline's own.
        batch: how many pictures are made at once.
    """

    steps: int = 10
    guidance_scale: float = 1.0
    scheduler: Any = None
    batch: int = 256


def sample_images(
    model: PipelineModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int = 0,
    assignment: Assignment | None = None,
) -> list[Image.Image]:
    """Make one picture for each prompt row, in order; :class:`~dgpo.media.Lost` for one that
    cannot be judged.

    The column ``seed`` of a row seeds its noise, or else ``seed`` plus its position does, so that a
    picture does not depend on the batch that it is made in.

    Args:
        model: the pipeline, with the weights to be judged in place.
        prompts: all rows.
        sampling: how to sample.
        seed: for rows without a seed of their own.
        assignment: which of the rows this process makes; by default all.
    """
    assignment = assignment or Assignment((torch.arange(len(prompts)),), 1)
    images: list[Image.Image] = []
    for turn in turns(assignment.batches(sampling.batch), model.sharded):
        if not len(turn.rows):
            continue
        # a dummy is made of the first prompt: there may be fewer prompts than processes
        places = assignment.mine[turn.rows].tolist() if turn.counts else [0]
        rows = [prompts[place] for place in places]
        given = [row.metadata.get("seed") for row in rows]
        seeds = [
            seed + place if one is None else int(one)
            for place, one in zip(places, given, strict=True)
        ]
        cond = model.encode([row.text for row in rows], guidance=sampling.guidance_scale != 1)
        rollout = model.rollout(
            cond,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            scheduler=sampling.scheduler,
            generators=[torch.Generator().manual_seed(s) for s in seeds],
        )
        assert rollout.images is not None
        images += rollout.images if turn.counts else []
    return images


def evaluate(
    model: PipelineModel,
    prompts: Sequence[Prompt],
    metrics: Metrics | Sequence[str | Callable],
    sampling: Sampling,
    name: str = "prompts",
    processes: Processes = SINGLE,
) -> tuple[Report, list[Image.Image]]:
    """Sample every prompt once and score the pictures. All processes must call it.

    Args:
        model: the pipeline, with the weights to be judged in place.
        prompts: held-out rows; the column ``tag``, if there is one, is the category.
        metrics: what :class:`Metrics` takes; the first metric is the overall score.
        sampling: how to sample.
        name: what the report calls the benchmark.
        processes: the processes that share the prompts, each sampling and scoring its own.

    Returns:
        The report on all pictures, and the pictures of this process.

    Raises:
        UserError: every picture is lost, or a metric's answer is unusable.

    >>> from dgpo.pocket import load_pocket
    >>> from dgpo.prompts import load_prompts
    >>> model = PipelineModel(load_pocket(), call={"max_sequence_length": 1})
    >>> prompts = load_prompts(["a photo of a red circle", "a photo of two squares"])
    >>> report, pictures = evaluate(model, prompts, ["redness"], Sampling(steps=2))
    >>> report.n, pictures[0].size
    (2, (32, 32))
    """
    assignment = Assignment(processes.split(len(prompts)), 1, processes)
    images = sample_images(model, prompts, sampling, assignment=assignment)
    return score(images, prompts, metrics, name, assignment), images


def score(
    images: Sequence[Image.Image],
    prompts: Sequence[Prompt],
    metrics: Metrics | Sequence[str | Callable],
    name: str = "images",
    assignment: Assignment | None = None,
) -> Report:
    """Score pictures that exist already, as :func:`evaluate` does.

    Args:
        images: the pictures of this process.
        prompts: the rows of all pictures.
        metrics, name: see :func:`evaluate`.
        assignment: which of the pictures this process has; by default all.

    >>> from dgpo.prompts import load_prompts
    >>> pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    >>> report = score(pictures, load_prompts(["a", "b"]), ["redness"])
    >>> report.n, report.rewards.keys()
    (2, dict_keys(['redness']))
    """
    assignment = assignment or Assignment((torch.arange(len(prompts)),), 1)
    metrics = metrics if isinstance(metrics, Metrics) else Metrics(metrics)
    count, lost = sum(map(len, assignment.places)), lost_of_all(images, assignment)
    if len(lost) == count:
        raise UserError(f"{name}: every picture is lost: {lost[0]}")
    if lost and assignment.processes.main:
        warnings.warn(f"{name}: {len(lost)} of {count} pictures are lost: {lost[0]}", stacklevel=3)
    each = each_of_all(metrics, images, prompts, assignment)
    whole = whole_of_all(metrics, images, prompts, assignment)
    tags = [str(row.metadata.get("tag", "all")) for row in prompts]
    found = {
        title: whole[title] if title in whole else stratified_mean(each[title], tags)
        for title in metrics.names
    }
    first = metrics.names[0]
    overall, parts = found[first], _parts(each[first], tags) if first in each else {}
    return Report(
        benchmark=name,
        overall=overall.value,
        categories={tag: float(part.mean()) for tag, part in parts.items()},
        rewards={title: interval.value for title, interval in found.items()},
        n=count - len(lost),
        ci95=(overall.low, overall.high),
        intervals={title: (interval.low, interval.high) for title, interval in found.items()},
        lost=len(lost),
    )


def stratified_mean(values: Tensor, tags: Sequence[str]) -> Interval:
    """Return the mean of the categories' means and its normal 95% interval.

    The variance is ``sum_c s_c^2 / n_c / C^2`` with the categories' sample variances ``s_c^2``. A
    category of one picture has no variance of its own and takes the one of all pictures, which is
    rather too large. If there is a single picture in all, the interval has no width.

    Args:
        values: [N], one number for each picture; NaN is left out.
        tags: the category of each picture, N of them.

    >>> stratified_mean(torch.tensor([1.0, 0.0, 1.0, 1.0]), ["easy", "easy", "hard", "hard"])
    Interval(value=0.75, low=0.26, high=1.24)
    """
    parts = list(_parts(values, tags).values())
    if not parts:
        return Interval(math.nan, math.nan, math.nan)
    every = torch.cat(parts)
    borrowed = float(every.var()) if len(every) > 1 else 0.0
    variance = sum(float(p.var()) / len(p) if len(p) > 1 else borrowed for p in parts)
    mean = sum(float(part.mean()) for part in parts) / len(parts)
    half = 1.96 * math.sqrt(variance) / len(parts)
    return Interval(mean, mean - half, mean + half)


def _parts(values: Tensor, tags: Sequence[str]) -> dict[str, Tensor]:
    """Return the numbers of each category in float64, the categories in order of appearance.

    Rows without a number are left out: a NaN says that the prompt names other rewards, or that the
    picture is lost.
    """
    rows: dict[str, list[int]] = {}
    for row, (tag, absent) in enumerate(zip(tags, values.isnan().tolist(), strict=True)):
        if not absent:
            rows.setdefault(tag, []).append(row)
    return {tag: values.double()[torch.tensor(index)] for tag, index in rows.items()}
