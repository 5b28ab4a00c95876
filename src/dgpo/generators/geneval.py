"""The generator ``geneval`` makes prompts in GenEval's six categories, with their metadata.

Source of the form: Ghosh et al., "GenEval" (arXiv 2310.11513): classes, colours, relations, counts
of two to four, and clauses. The templates and plurals are our own, so that the prompts differ in
wording from the benchmark's; those that coincide with it can be left out (``without``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dgpo.rewards.shipped.geneval_judge import CLASSES, COLORS, RELATIONS

TEMPLATES = (
    "a photo of {}",
    "a photograph of {}",
    "a picture that shows {}",
    "a clear photo with {} in it",
    "{}, photographed in daylight",
    "a close view of {}",
    "a simple picture of {}",
    "{} in front of a plain background",
)
NUMBERS = {2: "two", 3: "three", 4: "four"}
_IRREGULAR = {
    "person": "people",
    "sheep": "sheep",
    "skis": "pairs of skis",
    "scissors": "pairs of scissors",
    "knife": "knives",
    "computer mouse": "computer mice",
    "broccoli": "heads of broccoli",
}
_ONE = {"skis": "pair of skis", "scissors": "pair of scissors", "broccoli": "head of broccoli"}
_UNPAINTED = {"person"}
"""The classes that get no colour."""

Clause = dict[str, Any]
_Draw = Callable[[np.random.Generator], tuple[str, list[Clause]]]


def rows(random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Yield rows without end, the six categories in turn.

    A row has ``prompt``, ``tag``, ``include`` and, for counting, ``exclude``.
    """
    while True:
        for tag, draw in CATEGORIES.items():
            things, include = draw(random)
            prompt = _one_of(TEMPLATES, random).format(things)
            row: dict[str, Any] = {"tag": tag, "include": include}
            if tag == "counting":
                (clause,) = include
                row["exclude"] = [{**clause, "count": clause["count"] + 1}]
            yield {**row, "prompt": prompt}


def plural(name: str) -> str:
    """Return the plural of a class: ``buses``, ``teddy bears``, ``people``."""
    if name in _IRREGULAR:
        return _IRREGULAR[name]
    if name.endswith(("s", "ch", "sh", "x")):
        return f"{name}es"
    return f"{name}s"


def one(name: str, color: str | None = None) -> str:
    """Return one of a class with its article: ``an orange car``, ``a pair of skis``."""
    thing = _ONE.get(name, name)
    words = f"{color} {thing}" if color else thing
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _one_of(values: Any, random: np.random.Generator) -> Any:
    return values[int(random.integers(len(values)))]


def _two(random: np.random.Generator, names: tuple[str, ...] = CLASSES) -> tuple[str, str]:
    first, second = random.choice(len(names), 2, replace=False)
    return names[int(first)], names[int(second)]


_PAINTED = tuple(name for name in CLASSES if name not in _UNPAINTED)


def _single(random: np.random.Generator) -> tuple[str, list[Clause]]:
    name = _one_of(CLASSES, random)
    return one(name), [{"class": name, "count": 1}]


def _both(random: np.random.Generator) -> tuple[str, list[Clause]]:
    names = _two(random)
    return " and ".join(map(one, names)), [{"class": name, "count": 1} for name in names]


def _counting(random: np.random.Generator) -> tuple[str, list[Clause]]:
    name, count = _one_of(CLASSES, random), _one_of(tuple(NUMBERS), random)
    return f"{NUMBERS[count]} {plural(name)}", [{"class": name, "count": count}]


def _colored(name: str, random: np.random.Generator) -> tuple[str, Clause]:
    # "an orange orange" names a fruit by its colour: no verdict could tell the two apart
    color = _one_of([color for color in COLORS if color != name], random)
    return one(name, color), {"class": name, "count": 1, "color": color}


def _colors(random: np.random.Generator) -> tuple[str, list[Clause]]:
    words, clause = _colored(_one_of(_PAINTED, random), random)
    return words, [clause]


def _position(random: np.random.Generator) -> tuple[str, list[Clause]]:
    moved, fixed = _two(random)
    relation = _one_of(RELATIONS, random)
    words = f"{one(moved)} {relation} {one(fixed)}"
    return words, [
        {"class": fixed, "count": 1},
        {"class": moved, "count": 1, "position": [relation, 0]},
    ]


def _color_attr(random: np.random.Generator) -> tuple[str, list[Clause]]:
    words, clauses = zip(*(_colored(n, random) for n in _two(random, _PAINTED)), strict=True)
    return " and ".join(words), list(clauses)


CATEGORIES: dict[str, _Draw] = {
    "single_object": _single,
    "two_object": _both,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}
