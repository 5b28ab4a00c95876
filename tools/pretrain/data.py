"""Training data of the pocket: pictures with captions, of which a known share is wrong."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgpo.pocket.scenes import (
    CATEGORIES,
    COLORS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SIDE,
    Scene,
    all_metadata,
    caption_of,
    coverage,
    draw_scene,
)

SCENE_WEIGHTS = {
    "single_object": 0.08,
    "two_object": 0.16,
    "counting": 0.18,
    "colors": 0.10,
    "position": 0.24,
    "color_attr": 0.24,
}
"""The share of each category in the pictures; what a small network learns last has more."""

LAST_WEIGHTS = {
    "single_object": 0.04,
    "two_object": 0.24,
    "counting": 0.20,
    "colors": 0.06,
    "position": 0.12,
    "color_attr": 0.34,
}
"""The share of each category in the last stage's batches; what is still drawn badly has more."""

CAPTION_NOISE = {
    "single_object": ("class", 0.55),
    "two_object": ("class", 0.30),
    "counting": ("count", 0.34),
    "colors": ("color", 0.57),
    "position": ("position", 0.45),
    "color_attr": ("color", 0.22),
}
"""Which attribute of a category's captions is wrong, and with what probability. Where a caption
names two shapes or two colours, each is wrong on its own."""

_VALUES: dict[str, tuple[Any, ...]] = {
    "class": SHAPES,
    "color": tuple(COLORS),
    "count": tuple(range(1, len(NUMBERS) + 1)),
}


def draw_scenes(count: int, seed: int) -> list[Scene]:
    """Draw random scenes in the proportions of ``SCENE_WEIGHTS``."""
    rng = np.random.default_rng(seed)
    rows = all_metadata()
    weights = np.asarray([SCENE_WEIGHTS[c] for c in CATEGORIES])
    kinds = rng.choice(len(CATEGORIES), count, p=weights / weights.sum())
    chosen = (rows[CATEGORIES[k]][rng.integers(len(rows[CATEGORIES[k]]))] for k in kinds)
    return [draw_scene(metadata, rng) for metadata in chosen]


def layout_of(scenes: list[Scene], patches: int = 4) -> Tensor:
    """Say what each patch of a picture shows, for the transformer's auxiliary head.

    Returns:
        int64 [N, patches * patches, 2]: the shape and the colour of the object that covers most of
        a patch, counted from 1, or 0 where no object covers a fifth of it. Objects count as discs.
    """
    grid = np.arange(SIDE, dtype=np.float32) + 0.5
    side = SIDE // patches
    labels = np.zeros((len(scenes), patches, patches, 2), np.int64)
    most = np.full((len(scenes), patches, patches), 0.2, np.float32)
    for layer in range(4):
        rows = np.asarray([i for i, s in enumerate(scenes) if len(s.shapes) > layer], np.int64)
        shapes = [scenes[i].shapes[layer] for i in rows]
        place = np.asarray([(s.x, s.y, s.r) for s in shapes], np.float32).reshape(-1, 3) * SIDE
        x, y, r = (place[:, k, None, None] for k in range(3))
        disc = coverage("circle", grid[None, None, :] - x, grid[None, :, None] - y, r)
        share = disc.reshape(-1, patches, side, patches, side).mean((2, 4))
        kinds = [(SHAPES.index(s.shape) + 1, [*COLORS].index(s.color) + 1) for s in shapes]
        index, down, right = np.nonzero(share > most[rows])
        labels[rows[index], down, right] = np.asarray(kinds, np.int64).reshape(-1, 2)[index]
        most[rows] = np.maximum(most[rows], share)
    return torch.from_numpy(labels.reshape(len(scenes), -1, 2))


def wrong_caption(metadata: dict[str, Any], rng: np.random.Generator) -> str:
    """Return the caption with each attribute replaced with the probability of its category.

    :func:`dgpo.pocket.scenes.parse_caption` can read every caption that comes out: one that would
    name a shape or a colour twice is left as it was.
    """
    tag = metadata["tag"]
    include = copy.deepcopy(metadata["include"])
    key, rate = CAPTION_NOISE[tag]
    if tag == "position":
        if rng.random() < rate:
            relation, target = include[0]["position"]
            include[0]["position"] = [_another(RELATIONS, relation, rng), target]
        return caption_of(tag, include)
    for clause in include:
        if rng.random() < rate:
            clause[key] = _another(_VALUES[key], clause[key], rng)
    if len({clause[key] for clause in include}) < len(include):
        return metadata["prompt"]  # "a circle and a circle" is not a caption
    return caption_of(tag, include)


def _another(values: tuple[Any, ...], value: Any, rng: np.random.Generator) -> Any:
    others = [other for other in values if other != value]
    return others[rng.integers(len(others))]
