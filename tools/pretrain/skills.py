"""The skills that a pocket can be pretrained for: scenes of shapes, and signs with digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgpo.pocket.scenes import (
    CATEGORIES,
    COLORS,
    PLURALS,
    RELATIONS,
    SHAPES,
    SIDE,
    all_metadata,
    render,
)
from dgpo.pocket.text import TOKENS
from dgpo.pocket.verifier import find_objects, judge
from tools.pretrain.build import SCENES_SHIFT, SHIFT
from tools.pretrain.data import (
    LAST_WEIGHTS,
    SCENE_WEIGHTS,
    draw_scenes,
    layout_of,
    wrong_caption,
)


@dataclass(frozen=True)
class Examples:
    """Pictures and what they show.

    Args:
        images: uint8 [N, H, W, 3].
        contents: what each picture shows, N entries.
        layout: int64 [N, image tokens, attributes], what each patch shows; see ``layout_of``.
    """

    images: np.ndarray
    contents: list[Any]
    layout: Tensor | None = None


@dataclass(frozen=True)
class Skill:
    """What pretraining needs to know about a task.

    Args:
        name: the skill's name.
        height, width: the size of the pictures, in pixels.
        draw: draws examples, ``(count, seed) -> Examples``.
        caption: returns the true caption of a content.
        wrong: returns a caption with the skill's noise, ``(content, rng) -> caption``.
        captions: the captions that the text encoders learn to read.
        labels: int64 [captions, attributes]; -1 where a caption does not name an attribute.
        held_out: rows with ``prompt`` and metadata, for evaluation in training.
        right: says which pictures are exactly right, ``(images, contents or rows) -> bools``.
        known: returns the share of the objects in pictures that are recognised.
        word_labels: int64 [captions, words, attributes], what each word is about; -1 where the
            caption does not name an attribute, -2 for a word that is about nothing. None: only
            whole captions are read.
        weight: returns how often the last stage draws a content, relative to the clean stage;
            None: equally.
        shift: the shift of the finished pipeline's sampler.
    """

    name: str
    height: int
    width: int
    draw: Callable[[int, int], Examples]
    caption: Callable[[Any], str]
    wrong: Callable[[Any, np.random.Generator], str]
    captions: list[str]
    labels: Tensor
    held_out: list[dict[str, Any]]
    right: Callable[[np.ndarray, list[Any]], list[bool]]
    known: Callable[[np.ndarray], float]
    word_labels: Tensor | None = None
    weight: Callable[[Any], float] | None = None
    shift: float = SHIFT


def scene_skill() -> Skill:
    """Return the skill of scenes: coloured shapes in GenEval's six categories.

    The contents are the metadata of captions.
    """
    rows = all_metadata()
    flat = [metadata for category in CATEGORIES for metadata in rows[category]]

    def draw(count: int, seed: int) -> Examples:
        scenes = draw_scenes(count, seed)
        return Examples(render(scenes), [s.metadata for s in scenes], layout_of(scenes))

    def right(images: np.ndarray, contents: list[Any]) -> list[bool]:
        return [judge(find_objects(i), c).strict for i, c in zip(images, contents, strict=True)]

    def known(images: np.ndarray) -> float:
        found = [thing for image in images for thing in find_objects(image)]
        good = sum(t.shape != "unknown" and t.color != "unknown" for t in found)
        return good / max(1, len(found))

    rng = np.random.default_rng(7)
    held_out = [rows[c][rng.integers(len(rows[c]))] for c in CATEGORIES for _ in range(60)]
    return Skill(
        name="scenes",
        height=SIDE,
        width=SIDE,
        draw=draw,
        caption=lambda metadata: metadata["prompt"],
        wrong=wrong_caption,
        captions=[metadata["prompt"] for metadata in flat],
        labels=torch.tensor([_scene_labels(metadata) for metadata in flat]),
        held_out=held_out,
        right=right,
        known=known,
        word_labels=torch.tensor([_noun_labels(metadata) for metadata in flat]),
        weight=lambda metadata: LAST_WEIGHTS[metadata["tag"]] / SCENE_WEIGHTS[metadata["tag"]],
        shift=SCENES_SHIFT,
    )


def _noun_labels(metadata: dict[str, Any]) -> list[list[int]]:
    """List the shape, colour, count, place in the caption and relation of every noun."""
    clauses, rows, nouns = metadata["include"], [], 0
    relation = clauses[0].get("position", [None])[0]
    for word in metadata["prompt"].split():
        found = [c for c in clauses if word in (c["class"], PLURALS[c["class"]])]
        if not found:
            rows.append([-2] * 5)
            continue
        color = found[0].get("color")
        rows.append(
            [
                SHAPES.index(found[0]["class"]),
                -1 if color is None else list(COLORS).index(color),
                found[0]["count"] - 1 if metadata["tag"] == "counting" else -1,
                nouns,
                # the encoders are causal: the first noun cannot know it
                RELATIONS.index(relation) if relation and nouns else -1,
            ]
        )
        nouns += 1
    return rows + [[-2] * 5] * (TOKENS - 2 - len(rows))


def _scene_labels(metadata: dict[str, Any]) -> list[int]:
    include, tag = metadata["include"], metadata["tag"]

    def index(options: tuple[str, ...], value: str | None) -> int:
        return -1 if value is None else options.index(value)

    second = include[1] if len(include) > 1 else {}
    return [
        CATEGORIES.index(tag),
        index(SHAPES, include[0]["class"]),
        index(SHAPES, second.get("class")),
        index(tuple(COLORS), include[0].get("color")),
        index(tuple(COLORS), second.get("color")),
        include[0]["count"] - 1 if tag == "counting" else -1,
        index(RELATIONS, include[0].get("position", [None])[0]),
    ]
