"""Training data for the pocket: pictures with captions of which a known share is wrong."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from dgpo.pocket.scenes import (
    CATEGORIES,
    COLORS,
    RELATIONS,
    SHAPES,
    Scene,
    all_metadata,
    caption_of,
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
"""Share of each category in pretraining: more of what a small network learns last."""

CAPTION_NOISE = {
    "single_object": {"class": 0.20},
    "two_object": {"class": 0.15},
    "counting": {"count": 0.25, "class": 0.08},
    "colors": {"class": 0.10, "color": 0.20},
    "position": {"class": 0.08, "position": 0.20},
    "color_attr": {"class": 0.05, "color": 0.12},
}
"""Probability that an attribute of the caption is replaced by a wrong one, each independently."""


def draw_scenes(count: int, seed: int) -> list[Scene]:
    """Random scenes in the proportions of ``SCENE_WEIGHTS``."""
    rng = np.random.default_rng(seed)
    rows = all_metadata()
    weights = np.asarray([SCENE_WEIGHTS[c] for c in CATEGORIES])
    kinds = rng.choice(len(CATEGORIES), count, p=weights / weights.sum())
    chosen = (rows[CATEGORIES[k]][rng.integers(len(rows[CATEGORIES[k]]))] for k in kinds)
    return [draw_scene(metadata, rng) for metadata in chosen]


def wrong_caption(metadata: dict[str, Any], rng: np.random.Generator) -> str:
    """The caption with every attribute replaced with its probability of ``CAPTION_NOISE``.

    What comes out is always a caption that :func:`dgpo.pocket.scenes.parse_caption` reads.
    """
    rates = CAPTION_NOISE[metadata["tag"]]
    include = copy.deepcopy(metadata["include"])

    def other(options: tuple, taken: set) -> Any:
        free = [o for o in options if o not in taken]
        return free[rng.integers(len(free))]

    for key, options in (("class", SHAPES), ("color", tuple(COLORS)), ("count", (1, 2, 3, 4))):
        for clause in include:
            if key in rates and rng.random() < rates[key]:
                clause[key] = other(options, {c[key] for c in include})
    if "position" in rates and rng.random() < rates["position"]:
        relation, target = include[0]["position"]
        include[0]["position"] = [other(RELATIONS, {relation}), target]
    return caption_of(metadata["tag"], include)
