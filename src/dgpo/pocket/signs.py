"""Signs that say a number: what is drawn, its caption, and which numbers training never sees.

A sign is 48 x 16 pixels, two to four dark digits on light paper; its caption is
``a sign that says "407"``. An OCR engine reads clean ones without a mistake
(:mod:`dgpo.rewards.shipped.ocr`), so what it cannot read a model has drawn badly.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH = 48
HEIGHT = 16
LENGTHS = (2, 3, 4)
"""How many digits a sign may have."""
PAPER = (225, 225, 225)
HELD_OUT_SHARE = 0.2
"""Share of the numbers of each length that no training row has."""
TEST_ROWS = 100
"""Test rows of each length."""
_FINE = 8
"""Signs are drawn this many times larger and averaged: smooth edges, positions of 1/8 pixel."""
_SEED = 2510_08425
_NOISE = 2_000_000


class Sign(NamedTuple):
    """One way to draw a number."""

    text: str
    x: float
    """Centre of the digits in pixels from the left edge."""
    y: float
    """Likewise from the top edge."""
    size: float
    """Font size in pixels (a digit is 0.73 of it high and 0.70 wide)."""
    ink: tuple[int, int, int]


def caption(text: str) -> str:
    """The one caption of a number."""
    return f'a sign that says "{text}"'


def draw_sign(text: str, rng: np.random.Generator) -> Sign:
    """Choose how a number is drawn: position, size and ink vary a little.

    Raises:
        ValueError: not two to four digits.
    """
    if not (text.isascii() and text.isdigit() and len(text) in LENGTHS):
        raise ValueError(f"a sign says 2 to 4 digits, got {text!r}")
    red, green, blue = (int(c) for c in rng.integers(0, 70, 3))
    return Sign(
        text,
        x=WIDTH / 2 + rng.uniform(-1.5, 1.5),
        y=HEIGHT / 2 + rng.uniform(-0.75, 0.75),
        size=rng.uniform(13.0, 14.5),
        ink=(red, green, blue),
    )


def render(signs: Sequence[Sign]) -> np.ndarray:
    """Pictures of signs: uint8 [N, 16, 48, 3], RGB, ink and paper blended by coverage."""
    if not signs:
        return np.zeros((0, HEIGHT, WIDTH, 3), np.uint8)
    cover = np.stack([_coverage(sign) for sign in signs])[..., None]
    ink = np.array([sign.ink for sign in signs], np.float32)[:, None, None]
    paper = np.array(PAPER, np.float32)
    return np.round(paper + (ink - paper) * cover).astype(np.uint8)


def _coverage(sign: Sign) -> np.ndarray:
    """Share of each pixel that is ink, float32 [16, 48]."""
    font = _font(round(sign.size * _FINE))
    page = Image.new("L", (WIDTH * _FINE, HEIGHT * _FINE))
    left, top, right, bottom = font.getbbox(sign.text)
    place = (sign.x * _FINE - (left + right) / 2, sign.y * _FINE - (top + bottom) / 2)
    ImageDraw.Draw(page).text(place, sign.text, font=font, fill=255)
    fine = np.asarray(page, np.float32).reshape(HEIGHT, _FINE, WIDTH, _FINE)
    return fine.mean((1, 3)) / 255


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / "DejaVuSans-Bold.ttf"), size)


@functools.cache
def numbers(length: int, held_out: bool) -> tuple[str, ...]:
    """The numbers of a length, leading zeros too, that training sees, or those that it never does.

    With ``length`` 2, 3, 4: 80, 800, 8,000 seen and 20, 200, 2,000 held out, fixed for ever.
    """
    random = np.random.Generator(np.random.PCG64([_SEED, length]))
    order = random.permutation(10**length)
    first = round(HELD_OUT_SHARE * len(order))
    return tuple(f"{n:0{length}d}" for n in (order[:first] if held_out else order[first:]))


def train_prompts() -> list[dict[str, Any]]:
    """Rows that cycle over the lengths, equally often, without the held-out numbers.

    Each row has ``prompt``, ``tag`` and ``text``.
    """
    longest = len(numbers(max(LENGTHS), held_out=False))
    return [_row(n, held_out=False, index=i) for i in range(longest) for n in LENGTHS]


def test_prompts() -> list[dict[str, Any]]:
    """300 rows of held-out numbers, 100 of each length in turn, fixed for ever.

    Each row has ``prompt``, ``tag``, ``text`` and ``seed``, the seed of its initial noise (numbers
    of two digits come back, with another seed).
    """
    rows = [_row(n, held_out=True, index=i) for i in range(TEST_ROWS) for n in LENGTHS]
    return [{**row, "seed": _NOISE + i} for i, row in enumerate(rows)]


def _row(length: int, held_out: bool, index: int) -> dict[str, Any]:
    texts = numbers(length, held_out)
    text = texts[index % len(texts)]
    return {"prompt": caption(text), "tag": f"{length} digits", "text": text}
