"""How unlike the rest of its group a picture is: a counterweight to rewards that make all alike.

Licence: this project's own. Range [0, 1], higher is better (more varied).
It is called once for each group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from dgpo.pictures import rgb
from dgpo.rewards.reward import Media, Reward, Texts

LEVELS = 4
"""How many levels each channel has; a picture's colours fall into LEVELS ** 3 bins."""


def color_histogram(image: Image.Image) -> np.ndarray:
    """Shares of the colours of a picture, float64 [64], without its most common one (mostly the
    background); all zero if it has no other."""
    pixels = np.asarray(rgb(image), np.int64).reshape(-1, 3) * LEVELS // 256
    bins = pixels @ np.array([LEVELS * LEVELS, LEVELS, 1])
    counts = np.bincount(bins, minlength=LEVELS**3).astype(np.float64)
    counts[counts.argmax()] = 0
    return counts / max(1.0, counts.sum())


class Variety(Reward):
    """How few of its colours a picture shares with the others of its group, in [0, 1].

    One minus the mean intersection of its colour histogram with theirs (Swain and Ballard 1991);
    0 for a picture of one colour alone. Beside a reward that a rare way of being right does not
    move, it keeps a group from becoming all of one kind: give it a small weight.
    """

    name = "variety"
    group_wise = True

    def __call__(self, images: Media, prompts: Texts, **columns: Any) -> list[float]:
        """One score for each picture of a group."""
        shares = np.stack([color_histogram(image) for image in images])
        common = np.minimum(shares[:, None], shares[None]).sum(-1)  # [G, G]; 1 with itself
        others = (common.sum(1) - common.diagonal()) / max(1, len(images) - 1)
        return np.where(shares.sum(1) > 0, 1 - others, 0.0).tolist()


variety = Variety()
