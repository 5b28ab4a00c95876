"""The pocket GenEval prompt sets: what training may see, and what it must not.

For ``position`` whole pairs of shapes are held out, for ``color_attr`` whole combinations of two
coloured shapes (both orders together), so that the test measures new combinations of known things.
The other four categories have too few captions for that: the test holds all of them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from dgpo.pocket.scenes import CATEGORIES, all_metadata

HELD_OUT_PAIRS = (frozenset({"circle", "cross"}), frozenset({"square", "triangle"}))
"""Unordered shape pairs that no training row of ``position`` has."""
HELD_OUT_SHARE = 0.2
"""Share of the unordered ``color_attr`` combinations that no training row has."""
TRAIN_WEIGHTS = {
    "single_object": 1,
    "two_object": 3,
    "counting": 2,
    "colors": 1,
    "position": 2,
    "color_attr": 3,
}
"""Rows of each category in every dozen training rows: more of what is hard, as Flow-GRPO's GenEval
set has it (7 position, 5 counting, 3 two colours, 1 colours, 1 two objects, 0 single)."""
TEST_ROWS = 110
"""Test rows of each category."""
_SEED = 2510_08425
_NOISE = 1_000_000


def _combination(row: dict[str, Any]) -> frozenset[tuple[str, str]]:
    return frozenset((clause["color"], clause["class"]) for clause in row["include"])


@functools.cache
def held_out_combinations() -> frozenset[frozenset[tuple[str, str]]]:
    """The ``color_attr`` combinations ``{(colour, shape), (colour, shape)}`` of the test."""
    every = sorted({tuple(sorted(_combination(row))) for row in all_metadata()["color_attr"]})
    random = np.random.Generator(np.random.PCG64(_SEED))
    chosen = random.permutation(len(every))[: round(HELD_OUT_SHARE * len(every))]
    return frozenset(frozenset(every[i]) for i in chosen)


def held_out(row: dict[str, Any]) -> bool:
    """Whether a caption's metadata belongs to a held-out combination."""
    if row["tag"] == "position":
        return frozenset(clause["class"] for clause in row["include"]) in HELD_OUT_PAIRS
    return row["tag"] == "color_attr" and _combination(row) in held_out_combinations()


def train_prompts() -> list[dict[str, Any]]:
    """Rows that cycle over the six categories by ``TRAIN_WEIGHTS``, without what is held out.

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
    """660 rows, 110 of each category in turn, fixed for ever.

    Each row has ``prompt``, ``tag``, ``include`` and ``seed``, the seed of its initial noise.
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
