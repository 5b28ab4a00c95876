"""A sign says a number; some numbers are held out, so that training never sees them.

A sign is 48 x 16 pixels, two to four dark digits on light paper; its caption is
``a sign that says "407"``. An OCR engine reads clean ones without a mistake
(:mod:`dgpo.rewards.shipped.ocr`), so a sign that it cannot read is drawn badly.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

WIDTH = 48
"""The width of a sign in pixels."""
HEIGHT = 16
"""The height of a sign in pixels."""
LENGTHS = (2, 3, 4)
"""How many digits a sign may have."""
HELD_OUT_SHARE = 0.2
"""The share of the numbers of each length that no training row has."""
TEST_ROWS = 100
"""How many test rows there are of each length."""
_SEED = 2510_08425
_NOISE = 2_000_000


def caption(text: str) -> str:
    """Return the one caption of a number."""
    return f'a sign that says "{text}"'


@functools.cache
def numbers(length: int, held_out: bool) -> tuple[str, ...]:
    """Return the numbers of a length that training sees, or those that are held out.

    They may begin with zeros. For lengths of 2, 3 and 4 training sees 80, 800 and 8,000 numbers;
    20, 200 and 2,000 are held out. The split never changes.

    >>> [len(numbers(length, held_out=True)) for length in LENGTHS]
    [20, 200, 2000]
    """
    random = np.random.Generator(np.random.PCG64([_SEED, length]))
    order = random.permutation(10**length)
    first = round(HELD_OUT_SHARE * len(order))
    return tuple(f"{n:0{length}d}" for n in (order[:first] if held_out else order[first:]))


def train_prompts() -> list[dict[str, Any]]:
    """Return rows that cycle over the lengths, equally often, without the held-out numbers.

    Each row has ``prompt``, ``tag`` and ``text``.
    """
    longest = len(numbers(max(LENGTHS), held_out=False))
    return [_row(n, held_out=False, index=i) for i in range(longest) for n in LENGTHS]


def test_prompts() -> list[dict[str, Any]]:
    """Return 300 rows of held-out numbers, 100 of each length in turn; they never change.

    Each row has ``prompt``, ``tag``, ``text`` and ``seed``, which seeds its initial noise (numbers
    of two digits come back with other seeds).
    """
    rows = [_row(n, held_out=True, index=i) for i in range(TEST_ROWS) for n in LENGTHS]
    return [{**row, "seed": _NOISE + i} for i, row in enumerate(rows)]


def _row(length: int, held_out: bool, index: int) -> dict[str, Any]:
    texts = numbers(length, held_out)
    text = texts[index % len(texts)]
    return {"prompt": caption(text), "tag": f"{length} digits", "text": text}
