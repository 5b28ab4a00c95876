"""Several processes share an evaluation: one of them makes and scores each picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dgpo.distributed.assignment import Assignment
from dgpo.errors import UserError
from dgpo.evaluation.metrics import Interval, Metrics
from dgpo.media import Lost
from dgpo.pictures import open_picture
from dgpo.prompts import Prompt
from dgpo.rewards import RewardFailure
from dgpo.rewards.http_client import png


def lost_of_all(images: Sequence[Any], share: Assignment) -> list[str]:
    """Return why each picture that is lost is, in all processes. All must call it.

    Args:
        images: the pictures of this process.
        share: says which process has which pictures.
    """
    own = [image.why for image in images if isinstance(image, Lost)]
    every = share.processes.all_gather_object(own, "the pictures that are lost")
    return [why for one in every for why in one]


def each_of_all(
    metrics: Metrics, images: Sequence[Any], prompts: Sequence[Prompt], share: Assignment
) -> dict[str, Tensor]:
    """Ask the metrics that judge single pictures: [N] numbers each. All processes must call it.

    Args:
        metrics: the metrics to ask.
        images: the pictures of this process.
        prompts: the rows of all N pictures.
        share: says which process has which pictures.

    Raises:
        UserError: a metric does not answer with one finite number for each picture.
        RewardFailure: a metric failed in any process, and the recipe lets failures pass.
    """
    rows = [prompts[place] for place in share.mine.tolist()]
    if share.processes.single:
        return metrics.of_each(images, rows)
    found = {name: torch.zeros(0) for name in metrics.names_of_each}
    failed = None
    try:
        if rows:
            found = metrics.of_each(images, rows)
    except RewardFailure as failure:
        if not failure.skips:
            raise
        failed = str(failure)
    # told to all before anything is gathered: a process that left alone would hang the others
    told = share.processes.all_gather_object(failed, "the scores of an evaluation")
    if failures := [one for one in told if one]:
        raise RewardFailure(failures[0], skips=True)
    return share.gather(found, {})[0]


def whole_of_all(
    metrics: Metrics, images: Sequence[Any], prompts: Sequence[Prompt], share: Assignment
) -> dict[str, Interval]:
    """Let the main process ask the metrics of the whole set once. All processes must call it.

    Pictures that are lost are left out.

    Args:
        metrics: the metrics to ask.
        images: the pictures of this process.
        prompts: the rows of all pictures.
        share: says which process has which pictures.

    Raises:
        UserError: an answer is not (value, low, high), or the pictures cannot be sent.
    """
    if not metrics.has_of_set:
        return {}
    if share.processes.single:
        return metrics.of_set(*_there(images, prompts))
    sent = share.processes.all_gather_object(
        [_sent(one) for one in images], "all pictures of an evaluation"
    )

    def ask() -> dict[str, Interval]:
        every = [_received(one) for process in sent for one in process]
        order = torch.cat(share.places).argsort().tolist()
        return metrics.of_set(*_there([every[row] for row in order], prompts))

    said = share.processes.broadcast_object(ask, "the metrics of the whole set")
    return {name: Interval(*values) for name, values in said.items()}


def _there(images: Sequence[Any], prompts: Sequence[Prompt]) -> tuple[list[Any], list[Prompt]]:
    """Return the pictures that are not lost, and their rows."""
    pairs = zip(images, prompts, strict=True)
    kept = [pair for pair in pairs if not isinstance(pair[0], Lost)]
    return [image for image, _ in kept], [prompt for _, prompt in kept]


def _sent(picture: Any) -> list[str]:
    """Return a still picture or a list of frames as PNG in base64, after a word for its kind."""
    if isinstance(picture, Lost):
        return ["lost"]
    frames = picture if isinstance(picture, list) else [picture]
    if not all(isinstance(frame, Image.Image) for frame in frames):
        raise UserError(
            f"eval.metrics: a metric of the whole set needs all pictures in one process, and a "
            f"{type(picture).__name__} cannot be sent there: evaluate with one process"
        )
    kind = "video" if isinstance(picture, list) else "picture"
    return [kind, *(base64.b64encode(png(frame)).decode() for frame in frames)]


def _received(texts: list[str]) -> Any:
    if texts[0] == "lost":
        return Lost("", None)
    frames = [open_picture(io.BytesIO(base64.b64decode(text)), "picture") for text in texts[1:]]
    return frames if texts[0] == "video" else frames[0]
