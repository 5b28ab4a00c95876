"""Variety: a picture counts by how few of its colours the rest of its group has."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.rewards import load_rewards
from dgpo.rewards.shipped.variety import color_histogram, variety


def scene(*colors: str, background: str = "white") -> Image.Image:
    """Squares of these colours, side by side."""
    image = Image.new("RGB", (40, 40), background)
    for place, color in enumerate(colors):
        ImageDraw.Draw(image).rectangle((10 * place, 0, 10 * place + 7, 7), fill=color)
    return image


def test_the_background_is_left_out() -> None:
    shares = color_histogram(scene("red", "red", "blue"))
    assert shares.sum() == pytest.approx(1)
    assert sorted(shares[shares > 0]) == pytest.approx([1 / 3, 2 / 3])
    assert not color_histogram(scene()).any()


def test_by_hand() -> None:
    group = [scene("red"), scene("red"), scene("blue"), scene("red", "blue"), scene()]
    # each meets the four others: intersections 1, 0, 1/2, 0 for the first, and so on
    wanted = [1 - 1.5 / 4, 1 - 1.5 / 4, 1 - 0.5 / 4, 1 - 1.5 / 4, 0.0]
    assert variety(group, ["p"] * 5) == pytest.approx(wanted)


def test_the_order_and_the_size_of_things_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    group = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(5)]
    order = rng.permutation(5)
    mixed = variety([group[i] for i in order], ["p"] * 5)
    assert mixed == pytest.approx([variety(group, ["p"] * 5)[i] for i in order])
    large = scene("red").resize((80, 80), Image.Resampling.NEAREST)
    assert variety([scene("red"), large], ["p"] * 2) == pytest.approx([0, 0])


def test_each_group_is_looked_at_alone() -> None:
    rewards = load_rewards({"variety": 1.0})
    images = [scene("red"), scene("red"), scene("blue"), scene("blue")]
    scored = rewards.score(images, [Prompt("a")] * 2 + [Prompt("b")] * 2, [0, 0, 1, 1])
    assert scored.by_name["variety"].tolist() == pytest.approx([0, 0, 0, 0])
    scored = rewards.score(images, [Prompt("a")] * 4, [0, 1, 0, 1])
    assert scored.by_name["variety"].tolist() == pytest.approx([1, 1, 1, 1])
    with pytest.raises(UserError, match="compares the pictures of a group"):
        rewards(images, [Prompt("a")] * 4)
