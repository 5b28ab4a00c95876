"""The second skill: signs with digits, which a real OCR engine reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dgpo.pocket.signs import HEIGHT, LENGTHS, WIDTH, caption, numbers
from dgpo.pocket.signs import test_prompts as held_out_rows
from tools.pretrain.sign_drawing import draw_sign, render
from tools.pretrain.skills import Examples, Skill

DIGIT_NOISE = 0.45
"""The probability that a digit of a caption is replaced, for each digit independently."""
EVALUATED = 120
"""The number of held-out rows that are sampled in training."""


def wrong_sign(text: str, rng: np.random.Generator) -> str:
    """Return the caption of a number, with each digit replaced with probability ``DIGIT_NOISE``."""
    digits = [
        str((int(d) + int(rng.integers(1, 10))) % 10) if rng.random() < DIGIT_NOISE else d
        for d in text
    ]
    return caption("".join(digits))


def sign_skill() -> Skill:
    """Return the skill of signs; the contents are all numbers, including the held-out ones."""
    from dgpo.rewards.shipped.ocr import read_signs

    texts = [t for n in LENGTHS for held in (False, True) for t in numbers(n, held)]
    by_length = {n: [t for t in texts if len(t) == n] for n in LENGTHS}

    def draw(count: int, seed: int) -> Examples:
        rng = np.random.default_rng(seed)
        chosen = []
        for _ in range(count):
            pool = by_length[LENGTHS[rng.integers(len(LENGTHS))]]
            chosen.append(pool[rng.integers(len(pool))])
        return Examples(render([draw_sign(text, rng) for text in chosen]), chosen)

    def right(images: np.ndarray, contents: list[Any]) -> list[bool]:
        wanted = [c if isinstance(c, str) else c["text"] for c in contents]
        return [read == text for read, text in zip(read_signs(images), wanted, strict=True)]

    def known(images: np.ndarray) -> float:
        return float(np.mean([r.isdigit() and len(r) in LENGTHS for r in read_signs(images)]))

    labels = [[int(t[i]) if i < len(t) else -1 for i in range(max(LENGTHS))] for t in texts]
    return Skill(
        name="signs",
        height=HEIGHT,
        width=WIDTH,
        draw=draw,
        caption=caption,
        wrong=wrong_sign,
        captions=[caption(t) for t in texts],
        labels=torch.tensor(labels),
        held_out=held_out_rows()[:EVALUATED],
        right=right,
        known=known,
    )
