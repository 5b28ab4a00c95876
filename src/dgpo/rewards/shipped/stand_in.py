"""Rewards that need no model: for trying a pipeline or a recipe out, and for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dgpo.pictures import rgb


def redness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """How much redder than grey a picture is, ``mean(R - (G + B) / 2) / 255``, in [-1, 1]."""
    scores = []
    for image in images:
        red, green, blue = np.asarray(rgb(image), np.float64).mean((0, 1)) / 255
        scores.append(float(red - (green + blue) / 2))
    return scores


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """The mean of all channels, in [0, 1]."""
    return [float(np.asarray(rgb(i), np.float64).mean() / 255) for i in images]


def level(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """The mean of all numbers of what was made, be it a picture, a film or a sound."""
    return [float(np.mean([_mean(f) for f in (i if isinstance(i, list) else [i])])) for i in images]


def _mean(frame: Any) -> float:
    if isinstance(frame, Tensor):
        frame = frame.float().cpu()
    return float(np.asarray(frame, np.float64).mean())
