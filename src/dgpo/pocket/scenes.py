"""A scene shows coloured shapes; its caption describes it, and the renderer draws it.

A scene is one to four flat shapes on a light canvas. Its caption belongs to one of GenEval's six
categories, and its metadata has GenEval's form, so that GenEval's reward can read it::

    {"tag": "position", "prompt": "a photo of a circle left of a square",
     "include": [{"class": "circle", "count": 1, "position": ["left of", 1]},
                 {"class": "square", "count": 1}]}
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

SIDE = 32
"""The width and height of the canvas in pixels."""
BACKGROUND = (225, 225, 225)
SHAPES = ("circle", "square", "cross", "triangle")
PLURALS = {"circle": "circles", "square": "squares", "cross": "crosses", "triangle": "triangles"}
COLORS = {
    "red": (220, 30, 30),
    "yellow": (245, 225, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 225),
    "purple": (135, 40, 175),
    "black": (20, 20, 20),
}
NUMBERS = ("one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MARGIN = 2 / SIDE
"""The least distance between the boxes of two shapes, as a share of the side."""


class Shape(NamedTuple):
    """A ``Shape`` is one shape of a scene; ``x``, ``y`` (centre) and ``r`` are shares of SIDE."""

    shape: str
    color: str
    x: float
    y: float
    r: float


@dataclass(frozen=True)
class Scene:
    """A ``Scene`` is what a caption says (``metadata``) and one way to draw it (``shapes``)."""

    metadata: dict[str, Any]
    shapes: tuple[Shape, ...]

    @property
    def caption(self) -> str:
        """Return the caption that describes the scene."""
        return self.metadata["prompt"]


def caption_of(tag: str, include: list[dict[str, Any]]) -> str:
    """Return the one caption of a category and its clauses (the inverse of :func:`parse_caption`).

    >>> caption_of("counting", [{"class": "circle", "count": 3}])
    'a photo of three circles'
    """
    first = include[0]
    if tag == "counting":
        count = first["count"]
        noun = first["class"] if count == 1 else PLURALS[first["class"]]
        return f"a photo of {NUMBERS[count - 1]} {noun}"
    names = [f"a {c['color']} {c['class']}" if "color" in c else f"a {c['class']}" for c in include]
    if tag == "position":
        return f"a photo of {names[0]} {first['position'][0]} {names[1]}"
    return f"a photo of {' and '.join(names)}"


_SINGULAR = {plural: shape for shape, plural in PLURALS.items()}
_NOUN = rf"a (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
_COUNT = re.compile(rf"a photo of ({'|'.join(NUMBERS)}) ({'|'.join((*SHAPES, *PLURALS.values()))})")
_NOUNS = re.compile(rf"a photo of {_NOUN}(?: (and|{'|'.join(RELATIONS)}) {_NOUN})?")


def parse_caption(caption: str) -> dict[str, Any]:
    """Return GenEval's metadata for a caption.

    Raises:
        ValueError: the caption has none of the forms that this module writes.

    >>> row = parse_caption("a photo of a red circle and a blue square")
    >>> row["tag"], row["include"][1]
    ('color_attr', {'class': 'square', 'count': 1, 'color': 'blue'})
    """
    text = caption.strip().lower()
    if match := _COUNT.fullmatch(text):
        number, noun = match.groups()
        clause = {"class": _SINGULAR.get(noun, noun), "count": NUMBERS.index(number) + 1}
        return {"tag": "counting", "prompt": text, "include": [clause]}
    match = _NOUNS.fullmatch(text)
    if match is None:
        raise ValueError(
            f"caption {caption!r} is not a scene: write for example 'a photo of a red circle', "
            "'a photo of three squares' or 'a photo of a circle left of a cross'"
        )
    color, shape, link, color2, shape2 = match.groups()
    include: list[dict[str, Any]] = [{"class": shape, "count": 1}]
    if color:
        include[0]["color"] = color
    if link is None:
        return {"tag": "colors" if color else "single_object", "prompt": text, "include": include}
    if link != "and":
        include[0]["position"] = [link, 1]
    if shape2 == shape:
        raise ValueError(
            f"caption {caption!r} names one shape twice, which nothing tells apart: name two "
            f"shapes, or count them as in 'a photo of two {PLURALS[shape]}'"
        )
    include.append({"class": shape2, "count": 1, **({"color": color2} if color2 else {})})
    tag = "two_object" if link == "and" else "position"
    return {"tag": "color_attr" if color and color2 else tag, "prompt": text, "include": include}


def all_metadata() -> dict[str, list[dict[str, Any]]]:
    """Return every caption that exists, by category, in a fixed order."""

    def one(tag: str, *include: dict[str, Any]) -> dict[str, Any]:
        clauses = list(include)
        return {"tag": tag, "prompt": caption_of(tag, clauses), "include": clauses}

    def noun(shape: str, **more: Any) -> dict[str, Any]:
        return {"class": shape, "count": 1, **more}

    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    hues = [(a, b) for a in COLORS for b in COLORS if a != b]
    return {
        "single_object": [one("single_object", noun(s)) for s in SHAPES],
        "two_object": [one("two_object", noun(a), noun(b)) for a, b in pairs],
        "counting": [
            one("counting", {"class": s, "count": n}) for s in SHAPES for n in range(1, 5)
        ],
        "colors": [one("colors", noun(s, color=c)) for s in SHAPES for c in COLORS],
        "position": [
            one("position", noun(a, position=[rel, 1]), noun(b))
            for a, b in pairs
            for rel in RELATIONS
        ],
        "color_attr": [
            one("color_attr", noun(a, color=c), noun(b, color=d)) for a, b in pairs for c, d in hues
        ],
    }


def draw_scene(metadata: dict[str, Any], rng: np.random.Generator) -> Scene:
    """Choose at random how a caption is drawn: places, sizes, and the colours that it leaves open.

    >>> scene = draw_scene(parse_caption("a photo of two circles"), np.random.default_rng(0))
    >>> [shape.shape for shape in scene.shapes], render([scene]).shape
    (['circle', 'circle'], (1, 32, 32, 3))
    """
    wanted: list[tuple[str, str]] = []
    for clause in metadata["include"]:
        color = clause.get("color") or str(rng.choice(list(COLORS)))
        wanted += [(clause["class"], color)] * clause["count"]
    relation = metadata["include"][0].get("position", [None])[0]
    largest = 0.18 if len(wanted) < 3 else 0.15
    while True:
        radii = rng.uniform(0.13, largest, len(wanted))
        places = _place(radii, relation, rng)
        if places is not None:
            break
    shapes = (
        Shape(s, c, *xy, float(r)) for (s, c), xy, r in zip(wanted, places, radii, strict=True)
    )
    return Scene(metadata, tuple(shapes))


def _place(
    radii: np.ndarray, relation: str | None, rng: np.random.Generator
) -> list[tuple[float, float]] | None:
    places: list[tuple[float, float]] = []
    for radius in radii:
        edge = 1.1 * radius + 0.02
        for _ in range(12):
            x, y = (float(v) for v in rng.uniform(edge, 1 - edge, 2))
            apart = (
                max(abs(x - u), abs(y - v)) >= radius + other + MARGIN
                for (u, v), other in zip(places, radii, strict=False)  # those placed so far
            )
            if all(apart):
                places.append((x, y))
                break
        else:
            return None
    if relation is not None and not _related(places[0], places[1], relation):
        return None
    return places


def _related(first: tuple[float, float], second: tuple[float, float], relation: str) -> bool:
    along, across = first[0] - second[0], first[1] - second[1]
    if relation in ("above", "below"):
        along, across = across, along
    wanted_sign = -1 if relation in ("left of", "above") else 1
    return along * wanted_sign > 1.2 * abs(across)


def render(scenes: list[Scene]) -> np.ndarray:
    """Draw scenes as uint8 [N, 32, 32, 3], with edges anti-aliased by coverage."""
    count = len(scenes)
    canvas = np.tile(np.asarray(BACKGROUND, np.float32), (count, SIDE, SIDE, 1))
    grid = np.arange(SIDE, dtype=np.float32) + 0.5
    for layer in range(4):
        rows = [i for i, scene in enumerate(scenes) if len(scene.shapes) > layer]
        for name in SHAPES:
            chosen = [i for i in rows if scenes[i].shapes[layer].shape == name]
            if not chosen:
                continue
            shapes = [scenes[i].shapes[layer] for i in chosen]
            place = np.asarray([(s.x, s.y, s.r) for s in shapes], np.float32) * SIDE
            px, py, radius = (place[:, k, None, None] for k in range(3))
            cover = coverage(name, grid[None, None, :] - px, grid[None, :, None] - py, radius)
            color = np.asarray([COLORS[s.color] for s in shapes], np.float32)[:, None, None, :]
            canvas[chosen] += cover[..., None] * (color - canvas[chosen])
    return np.round(canvas).astype(np.uint8)


def coverage(shape: str, x: np.ndarray, y: np.ndarray, r: np.ndarray | float) -> np.ndarray:
    """Return the share of a pixel that a shape covers, found by its signed distance.

    Args:
        shape: one of ``SHAPES``.
        x, y: pixel centres relative to the shape's centre, in pixels, x to the right and y down.
        r: the radius in pixels.

    Returns:
        The coverage in [0, 1], in the broadcast shape of the arguments.
    """
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        inside = r - np.hypot(x, y)
    elif shape == "square":
        inside = 0.9 * r - np.maximum(ax, ay)
    elif shape == "cross":
        upright = np.minimum(0.36 * r - ax, r - ay)
        level = np.minimum(r - ax, 0.36 * r - ay)
        inside = np.maximum(upright, level)
    elif shape == "triangle":
        slant = (y + r - 1.85 * ax) / np.hypot(1.0, 1.85)
        inside = np.minimum(0.85 * r - y, slant)
    else:
        raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")
    return np.clip(inside + 0.5, 0.0, 1.0)
