"""Signs are drawn as a model shall learn to draw them: position, size and ink vary a little."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dgpo.pocket.signs import HEIGHT, LENGTHS, WIDTH

PAPER = (225, 225, 225)
_FINE = 8
"""How many times larger signs are drawn before they are averaged: smooth edges, 1/8 pixel."""


class Sign(NamedTuple):
    """A ``Sign`` is one way to draw a number."""

    text: str
    x: float
    """The centre of the digits in pixels from the left edge."""
    y: float
    """The centre of the digits in pixels from the top edge."""
    size: float
    """The font size in pixels; a digit is 0.73 of it high and 0.70 of it wide."""
    ink: tuple[int, int, int]


def draw_sign(text: str, rng: np.random.Generator) -> Sign:
    """Choose how a number is drawn: position, size and ink vary a little.

    Raises:
        ValueError: the text is not two to four digits.
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
    """Draw signs as uint8 [N, 16, 48, 3], RGB, with ink and paper blended by coverage."""
    if not signs:
        return np.zeros((0, HEIGHT, WIDTH, 3), np.uint8)
    cover = np.stack([_coverage(sign) for sign in signs])[..., None]
    ink = np.array([sign.ink for sign in signs], np.float32)[:, None, None]
    paper = np.array(PAPER, np.float32)
    return np.round(paper + (ink - paper) * cover).astype(np.uint8)


def _coverage(sign: Sign) -> np.ndarray:
    """Return the share of each pixel that is ink, float32 [16, 48]."""
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
