"""The exact verifier reads the shapes back from a picture and scores it against a caption.

An object is an 8-connected region that differs from the background. Most of its core pixels decide
its colour. Its shape is the best match in a bank of templates, drawn at many sub-pixel places and
radii (intersection over union of coverage). An object that matches nothing is ``unknown`` and
counts as a wrong one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from dgpo.pocket.scenes import BACKGROUND, COLORS, SHAPES, SIDE, coverage

DIFFERS = 45
"""How much an object's pixel must differ from the background in some channel (0 to 255)."""
LEAST_PIXELS = 8
"""Smaller regions are specks, not objects."""
LEAST_IOU = 0.75
"""An object that matches its best template less is ``unknown``."""
COLOR_RADIUS = 75.0
"""The largest RGB distance (0 to 255) of a core pixel to the palette colour that it votes for."""
_WINDOW = 16
_EIGHT = np.ones((3, 3), bool)
_PALETTE = np.asarray(list(COLORS.values()), np.float32)
_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class Found:
    """A ``Found`` is an object read from a picture; ``x`` and ``y`` are its centre in pixels."""

    shape: str
    color: str
    x: float
    y: float
    iou: float


def find_objects(image: np.ndarray) -> list[Found]:
    """Read the objects of one picture.

    Args:
        image: uint8 or float [32, 32, 3] in 0..255.

    Raises:
        ValueError: the picture has another size.
    """
    if image.shape != (SIDE, SIDE, 3):
        raise ValueError(
            f"the pocket verifier reads [{SIDE}, {SIDE}, 3] pictures, not {list(image.shape)}"
        )
    pixels = image.astype(np.float32)
    differs = np.abs(pixels - np.asarray(BACKGROUND, np.float32)).max(-1) > DIFFERS
    labels: Any = ndimage.label(differs, structure=_EIGHT)
    labels = labels[0]
    found = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[box] == index
        if mask.sum() >= LEAST_PIXELS:
            found.append(_read(pixels, labels == index, mask, box))
    return found


def _read(pixels: np.ndarray, region: np.ndarray, mask: np.ndarray, box: tuple) -> Found:
    color, rgb = _color(pixels[box], mask)
    near = ndimage.binary_dilation(region, structure=_EIGHT)
    background = np.asarray(BACKGROUND, np.float32)
    axis = rgb - background
    # how far a pixel's colour is on the way from the background to the object's colour
    cover = np.clip((pixels - background) @ axis / max(float(axis @ axis), 1.0), 0, 1) * near
    total = float(cover.sum())
    grid = np.arange(SIDE) + 0.5
    x, y = float(cover.sum(0) @ grid) / total, float(cover.sum(1) @ grid) / total
    shape, iou = _best_shape(cover, x, y)
    return Found(shape if iou > LEAST_IOU else "unknown", color, x, y, iou)


def _color(patch: np.ndarray, mask: np.ndarray) -> tuple[str, np.ndarray]:
    core: Any = ndimage.binary_erosion(mask, structure=_EIGHT)
    if core.sum() < 4:
        core = mask
    inner = patch[core]
    distance = np.linalg.norm(inner[:, None] - _PALETTE[None], axis=-1)
    nearest = distance.argmin(1)
    votes = np.bincount(nearest[distance.min(1) < COLOR_RADIUS], minlength=len(_NAMES))
    winner = int(votes.argmax())
    if votes[winner] * 2 <= len(inner):
        return "unknown", np.median(inner, axis=0)
    return _NAMES[winner], np.median(inner[nearest == winner], axis=0)


@functools.cache
def _bank() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return templates [N, 256] centred on their centroid, their sums [N] and shape indices [N]."""
    grid = np.arange(_WINDOW) + 0.5 - _WINDOW / 2
    places = (np.arange(4) - 1.5) / 4
    radii = np.linspace(0.12, 0.19, 12) * SIDE
    rows, kinds = [], []
    for kind, shape in enumerate(SHAPES):
        for radius in radii:
            lift = 0.0
            if shape == "triangle":
                # its centroid lies below its centre, and objects are placed by their centroid
                fine = (np.arange(_WINDOW * 8) + 0.5) / 8 - _WINDOW / 2
                dense = coverage(shape, fine[None, :], fine[:, None], radius)
                lift = float(dense.sum(1) @ fine / dense.sum())
            for dx in places:
                for dy in places:
                    rows.append(
                        coverage(shape, grid[None, :] - dx, grid[:, None] - dy + lift, radius)
                    )
                    kinds.append(kind)
    bank = np.stack(rows).reshape(len(rows), -1).astype(np.float32)
    return bank, bank.sum(1), np.asarray(kinds)


def _best_shape(cover: np.ndarray, x: float, y: float) -> tuple[str, float]:
    bank, sums, kinds = _bank()
    half = _WINDOW // 2
    left, top = round(x) - half, round(y) - half
    padded = np.pad(cover, _WINDOW)
    window = padded[top + _WINDOW : top + 2 * _WINDOW, left + _WINDOW : left + 2 * _WINDOW]
    flat = window.reshape(-1).astype(np.float32)
    spill = float(cover.sum()) - float(flat.sum())
    both = np.minimum(bank, flat).sum(1)  # intersection; what spills over counts in the union only
    iou = both / (sums + float(flat.sum()) + spill - both)
    best = int(iou.argmax())
    return SHAPES[kinds[best]], float(iou[best])


@dataclass(frozen=True)
class Verdict:
    """A ``Verdict`` is the strict success and the soft score in [0, 1]."""

    strict: bool
    soft: float


def verify(image: np.ndarray, metadata: dict[str, Any]) -> Verdict:
    """Score one picture against a caption's metadata.

    The soft score is the mean over the caption's clauses, as in GenEval's training reward. A wanted
    shape gives ``1 - |wanted - found| / wanted`` (not below 0). A named colour gives the share of
    the wanted objects that have it, or 0 if their count is wrong. A position gives 1 or 0. One more
    clause wants nothing else in the picture: ``1 / (1 + other objects)``. Strict success means that
    every clause is met exactly and that all colours are palette colours.

    Args:
        image: uint8 or float [32, 32, 3] in 0..255.
        metadata: what :func:`~dgpo.pocket.scenes.parse_caption` returns for the caption.

    >>> from dgpo.pocket.scenes import draw_scene, parse_caption, render
    >>> row = parse_caption("a photo of a red circle")
    >>> (picture,) = render([draw_scene(row, np.random.default_rng(0))])
    >>> verify(picture, row)
    Verdict(strict=True, soft=1.0)
    >>> verify(picture, parse_caption("a photo of two circles"))
    Verdict(strict=False, soft=0.75)
    """
    return judge(find_objects(image), metadata)


def judge(found: list[Found], metadata: dict[str, Any]) -> Verdict:
    """Score objects that are read already, as :func:`verify` does."""
    include = metadata["include"]
    named = {clause["class"] for clause in include}
    clauses: list[float] = []
    chosen: list[list[Found]] = []
    for clause in include:
        same = [f for f in found if f.shape == clause["class"]]
        wanted, color = clause["count"], clause.get("color")
        clauses.append(max(0.0, 1 - abs(wanted - len(same)) / wanted))
        if color:
            right = [f for f in same if f.color == color]
            clauses.append(len(right) / wanted if len(same) == wanted else 0.0)
        chosen.append(same)
    for clause, same in zip(include, chosen, strict=True):
        if "position" in clause:
            relation, target = clause["position"]
            pair = (same[:1], chosen[target][:1])
            clauses.append(float(all(pair) and _holds(pair[0][0], pair[1][0], relation)))
    others = sum(f.shape not in named for f in found)
    clauses.append(1 / (1 + others))
    known = all("unknown" not in (f.shape, f.color) for f in found)
    strict = known and all(c == 1.0 for c in clauses)
    return Verdict(strict, sum(clauses) / len(clauses))


def _holds(first: Found, second: Found, relation: str) -> bool:
    dx, dy = first.x - second.x, first.y - second.y
    if relation in ("left of", "right of"):
        return abs(dx) > abs(dy) and (dx < 0) == (relation == "left of")
    return abs(dy) > abs(dx) and (dy < 0) == (relation == "above")
