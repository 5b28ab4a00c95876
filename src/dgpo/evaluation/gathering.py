"""An evaluation over several processes: each picture is made and scored by one of them."""

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
from dgpo.prompts import Prompt
from dgpo.rewards import RewardFailure


def each_of_all(
    metrics: Metrics, images: Sequence[Any], prompts: Sequence[Prompt], share: Assignment
) -> dict[str, Tensor]:
    """The metrics of single pictures, [N] each, of which every process asks its own. Collective.

    Args:
        images: of this process.
        prompts: all of them.
        share: who has which.

    Raises:
        UserError: an answer is not as many finite numbers; a failure that the recipe lets pass is
            raised in all processes.
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
    failures = [
        one
        for one in share.processes.all_gather_object(failed, "the scores of an evaluation")
        if one
    ]
    if failures:
        raise RewardFailure(failures[0], skips=True)
    return share.gather(found, {})[0]


def whole_of_all(
    metrics: Metrics, images: Sequence[Any], prompts: Sequence[Prompt], share: Assignment
) -> dict[str, Interval]:
    """The metrics of the whole set, asked once by the main process. Collective.

    Raises:
        UserError: an answer is not (value, low, high), or the pictures cannot be sent to it.
    """
    if share.processes.single or not metrics.has_of_set:
        return metrics.of_set(images, prompts)
    sent = share.processes.all_gather_object(
        [_sent(one) for one in images], "all pictures of an evaluation"
    )

    def ask() -> dict[str, Interval]:
        every = [_received(one) for process in sent for one in process]
        order = torch.cat(share.places).argsort().tolist()
        return metrics.of_set([every[row] for row in order], prompts)

    said = share.processes.broadcast_object(ask, "the metrics of the whole set")
    return {name: Interval(*values) for name, values in said.items()}


def _sent(picture: Any) -> list[str]:
    """The frames of a picture as PNG in base64: one of a still picture, which is no list."""
    frames = picture if isinstance(picture, list) else [picture]
    if not all(isinstance(frame, Image.Image) for frame in frames):
        raise UserError(
            f"eval.metrics: a metric of a whole set needs all pictures in one process, and a "
            f"{type(picture).__name__} cannot be sent there: evaluate with one process"
        )
    texts = ["video" if isinstance(picture, list) else "picture"]
    for frame in frames:
        file = io.BytesIO()
        frame.save(file, "png")
        texts.append(base64.b64encode(file.getvalue()).decode())
    return texts


def _received(texts: list[str]) -> Any:
    frames = [Image.open(io.BytesIO(base64.b64decode(text))) for text in texts[1:]]
    return frames if texts[0] == "video" else frames[0]
