"""The pocket GenEval prompt sets separate what training may see from what it must not.

Whole pairs of shapes are held out for ``position``, and whole combinations of two coloured shapes
(both orders together) for ``color_attr``, so that the test measures new combinations of known
things. The other four categories have too few captions for that: the test has all of them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from dgpo.pocket.scenes import CATEGORIES, all_metadata

HELD_OUT_PAIRS = (frozenset({"circle", "cross"}), frozenset({"square", "triangle"}))
"""The unordered pairs of shapes that no training row of ``position`` has."""
HELD_OUT_SHARE = 0.2
"""The share of the unordered ``color_attr`` combinations that no training row has."""
TRAIN_WEIGHTS = {
    "single_object": 1,
    "two_object": 3,
    "counting": 2,
    "colors": 1,
    "position": 2,
    "color_attr": 3,
}
"""How many rows of each category are in a dozen training rows. Hard categories have more, as in
Flow-GRPO's GenEval set (7 position, 5 counting, 3 two colours, 1 colours, 1 two objects, 0
single)."""
TEST_ROWS = 110
"""How many test rows there are of each category."""
_SEED = 2510_08425
_NOISE = 1_000_000


def _combination(row: dict[str, Any]) -> frozenset[tuple[str, str]]:
    return frozenset((clause["color"], clause["class"]) for clause in row["include"])


@functools.cache
def held_out_combinations() -> frozenset[frozenset[tuple[str, str]]]:
    """Return the held-out ``color_attr`` combinations ``{(colour, shape), (colour, shape)}``."""
    every = sorted({tuple(sorted(_combination(row))) for row in all_metadata()["color_attr"]})
    random = np.random.Generator(np.random.PCG64(_SEED))
    chosen = random.permutation(len(every))[: round(HELD_OUT_SHARE * len(every))]
    return frozenset(frozenset(every[i]) for i in chosen)


def held_out(row: dict[str, Any]) -> bool:
    """Return whether a caption's metadata belongs to a held-out combination."""
    if row["tag"] == "position":
        return frozenset(clause["class"] for clause in row["include"]) in HELD_OUT_PAIRS
    return row["tag"] == "color_attr" and _combination(row) in held_out_combinations()


def train_prompts() -> list[dict[str, Any]]:
    """Return rows that cycle over the six categories by ``TRAIN_WEIGHTS``, none held out.

    Each row has ``prompt``, ``tag`` and ``include``.
    """
    seen = {tag: [row for row in rows if not held_out(row)] for tag, rows in all_metadata().items()}
    cycles = max(math.ceil(len(seen[tag]) / weight) for tag, weight in TRAIN_WEIGHTS.items())
    return [
        seen[tag][(cycle * weight + i) % len(seen[tag])]
        for cycle in range(cycles)
        for tag, weight in TRAIN_WEIGHTS.items()
        for i in range(weight)
    ]


def test_prompts() -> list[dict[str, Any]]:
    """Return 660 rows, 110 of each category in turn; they never change.

    Each row has ``prompt``, ``tag``, ``include`` and ``seed``, which seeds its initial noise.

    >>> rows = test_prompts()
    >>> len(rows), rows[0]["tag"], rows[0]["seed"]
    (660, 'single_object', 1000000)
    """
    random = np.random.Generator(np.random.PCG64(_SEED + 1))
    chosen = {}
    for tag, rows in all_metadata().items():
        if tag in ("position", "color_attr"):
            rows = [row for row in rows if held_out(row)]
        order = random.permutation(len(rows))
        chosen[tag] = [rows[order[i % len(rows)]] for i in range(TEST_ROWS)]
    rows = [chosen[tag][i] for i in range(TEST_ROWS) for tag in CATEGORIES]
    return [{**row, "seed": _NOISE + i} for i, row in enumerate(rows)]
