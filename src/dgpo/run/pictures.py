"""Grids of samples with their captions, and the curve of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dgpo.media import Lost, Sound, Video
from dgpo.pictures import rgb

_PAD = 8
_INK = (40, 40, 40)
_PAPER = (255, 255, 255)
_FONT_SIZE = 12
_SIDE = 160
"""The longer edge of a picture in a grid, in pixels."""


def thumbnail(image: Any, side: int = _SIDE) -> Image.Image:
    """Fit a picture's longer edge to ``side`` pixels.

    A video becomes its key frames in a row, a sound its waveform, a lost sample the word. Small
    pictures are enlarged by a whole factor without smoothing, so that their pixels are seen.
    """
    picture = rgb(_still(image, side))
    longest = max(picture.size)
    if longest > side:
        scale, method = side / longest, Image.Resampling.LANCZOS
    else:
        scale, method = side // longest, Image.Resampling.NEAREST
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, method)


def _still(made: Any, side: int) -> Image.Image:
    if isinstance(made, Lost):
        sheet = Image.new("RGB", (side, side), _PAPER)
        ImageDraw.Draw(sheet).text((_PAD, _PAD), "lost", _INK, ImageFont.load_default(_FONT_SIZE))
        return sheet
    if isinstance(made, Sound):
        return made.picture((side, side // 2))
    if not isinstance(made, Video):
        return made
    frames = made.key_frames()
    width, height = frames[0].size
    strip = Image.new("RGB", (len(frames) * (width + 1) - 1, height), _PAPER)
    for place, frame in enumerate(frames):
        strip.paste(frame, (place * (width + 1), 0))
    return strip


def grid(images: Sequence[Any], captions: Sequence[str]) -> Image.Image:
    """Lay pictures out in rows, each with its caption below it."""
    return _sheet([[image] for image in images], captions)


def before_after(
    before: Sequence[Any], after: Sequence[Any], captions: Sequence[str]
) -> Image.Image:
    """Lay out pairs of the same prompt and seed, the base model's picture on the left."""
    pairs = [list(pair) for pair in zip(before, after, strict=True)]
    return _sheet(pairs, captions, "each pair: before | after, same prompt and seed")


def _sheet(
    cells: Sequence[Sequence[Any]], captions: Sequence[str], header: str = ""
) -> Image.Image:
    if not cells or len(cells) != len(captions):
        raise ValueError(f"{len(cells)} pictures and {len(captions)} captions")
    font = ImageFont.load_default(_FONT_SIZE)
    thumbnails = [list(map(thumbnail, cell)) for cell in cells]
    tall = max(picture.height for cell in thumbnails for picture in cell)
    across = len(cells[0])
    columns = _columns(len(cells), across)
    width = across * _SIDE + (across - 1) * 2
    texts = [_wrap(caption, font, width) for caption in captions]
    line = _FONT_SIZE + 3
    height = tall + line * max(map(len, texts)) + 4
    rows = math.ceil(len(cells) / columns)
    top = _PAD + (line + 4 if header else 0)
    size = (columns * (width + _PAD) + _PAD, top + rows * (height + _PAD))
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    if header:
        draw.text((_PAD, _PAD), header, _INK, font)
    for index, (cell, text) in enumerate(zip(thumbnails, texts, strict=True)):
        x = _PAD + index % columns * (width + _PAD)
        y = top + index // columns * (height + _PAD)
        for place, picture in enumerate(cell):
            left = x + place * (_SIDE + 2) + (_SIDE - picture.width) // 2
            sheet.paste(picture, (left, y + (tall - picture.height) // 2))
        draw.multiline_text((x, y + tall + 3), "\n".join(text), _INK, font, spacing=3)
    return sheet


def _columns(count: int, across: int) -> int:
    """Choose a nearly square layout; of two choices, the one with the fuller last row."""
    near = max(1, math.ceil(math.sqrt(count / across)))
    return min((near, near + 1), key=lambda columns: (-count % columns, columns > near))


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Break a caption into lines, three at the most."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines if len(lines) <= 3 else [*lines[:2], f"{lines[2]} ..."]


def curve(
    rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], file: str | Path
) -> None:
    """Draw the training reward by iteration and the held-out scores by training minutes.

    Args:
        rows: the rows of ``metrics.jsonl``.
        evaluations: the rows of ``evaluations.jsonl``.
        file: the PNG to write.
    """
    # the object interface needs no display and leaves pyplot's global state alone
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _reward_panel(left, [r for r in rows if r.get("reward_mean") is not None])
    _score_panel(right, evaluations)
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def _reward_panel(panel: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    panel.set(title="Reward of the rollouts", xlabel="iteration", ylabel="mean reward")
    if not rows:
        return
    x = np.asarray([row["iteration"] for row in rows])
    y = np.asarray([row["reward_mean"] for row in rows], float)
    panel.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1, label="each iteration")
    window = max(1, len(y) // 20)
    if window > 1:
        smooth = np.convolve(y, np.ones(window) / window, mode="valid")
        panel.plot(x[window - 1 :], smooth, color="tab:blue", label=f"mean of {window}")
    panel.legend(frameon=False, loc="lower right")


def _score_panel(panel: Any, evaluations: Sequence[Mapping[str, Any]]) -> None:
    panel.set(title="Held-out prompts", xlabel="minutes of training", ylabel="score")
    if not evaluations:
        return
    minutes = [e["seconds"] / 60 for e in evaluations]
    for category in evaluations[-1].get("categories") or {}:
        values = [(e.get("categories") or {}).get(category) for e in evaluations]
        values = [math.nan if v is None else v for v in values]
        panel.plot(minutes, values, linewidth=1, alpha=0.6, label=category)
    overall = np.asarray([e["overall"] for e in evaluations], float)
    bounds = np.asarray([e["ci95"] for e in evaluations], float).T
    error = np.maximum([overall - bounds[0], bounds[1] - overall], 0)
    look = {"color": "black", "marker": "o", "markersize": 4, "capsize": 3, "linewidth": 2}
    panel.errorbar(minutes, overall, error, label="overall, 95% interval", **look)
    # a long list of categories would leave the axes no room
    panel.legend(frameon=False, fontsize="small", loc="best").set_in_layout(False)
