"""Rewards that answer anything: numbers that are theirs, or a failure that names the reward."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dgpo.prompts import Prompt
from dgpo.rewards import load_rewards
from fuzz.parts import PROFILE, value_or_error

COUNT, GROUPS = 4, [0, 0, 1, 1]
IMAGES = [Image.new("RGB", (2, 2))] * COUNT
ROWS = [Prompt(f"p{row}") for row in range(COUNT)]


class Strange:
    """An answer whose methods raise, or that says it is longer than it is."""

    def __len__(self) -> int:
        return COUNT

    def tolist(self) -> Any:
        raise RuntimeError("no list")


NUMBERS = st.floats() | st.floats(width=16, allow_nan=False, allow_infinity=False)
ENTRIES = (
    NUMBERS
    | st.integers()
    | st.sampled_from(
        [10**400, 1e39, "0.5", "", None, True, 1j, [0.5], {}, b"1", np.float32("nan")]
    )
    | NUMBERS.map(np.float64)
    | NUMBERS.map(torch.tensor)
)
LISTS = st.lists(ENTRIES, max_size=6) | st.lists(NUMBERS, min_size=COUNT, max_size=COUNT)
ANSWERS = (
    LISTS
    | LISTS.map(tuple)
    | LISTS.map(iter)
    | st.lists(NUMBERS, max_size=6).map(lambda v: torch.tensor(v, dtype=torch.float64))
    | st.lists(NUMBERS, min_size=COUNT, max_size=COUNT).map(np.array)
    | st.sampled_from(
        [
            None, 0.5, "0123", b"0123", {}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, {1.0, 2.0, 3.0, 4.0},
            Strange(), torch.zeros(COUNT, 1), torch.zeros(1, COUNT), torch.zeros(()),
            torch.zeros(COUNT, requires_grad=True), torch.zeros(COUNT, dtype=torch.complex64),
            np.array(["a"] * COUNT), np.zeros((COUNT, 2)), np.array([None] * COUNT), range(COUNT),
            ValueError("an error is no answer"),
        ]
    )
)  # fmt: skip


@PROFILE
@given(answer=ANSWERS, skips=st.booleans())
def test_answers(answer: Any, skips: bool) -> None:
    asked: list[Any] = []

    def reward(images: Any, prompts: Any) -> Any:
        asked.append(len(images))
        return answer

    rewards = load_rewards({reward: {"on_error": "skip_group" if skips else "stop"}})  # pyright: ignore
    scored = value_or_error(lambda: rewards.score(IMAGES, ROWS, GROUPS))
    if scored is None:
        assert not skips and asked == [COUNT]
        return
    (found,) = scored.by_name.values()
    assert found.dtype == torch.float32 and found.shape == (COUNT,)
    for row, group in enumerate(GROUPS):
        if group in scored.lost:
            assert skips and "reward" in scored.lost[group]
            assert bool(found[row].isnan())  # never a 0 in its place
        else:
            assert bool(found[row].isfinite())
    if not scored.lost and len(asked) == 1:
        given_numbers = torch.tensor([float(one) for one in answer], dtype=torch.float64)
        assert torch.equal(found, given_numbers.float())
