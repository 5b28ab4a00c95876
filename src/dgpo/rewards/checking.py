"""What a reward has answered, before it is believed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgpo.rewards.call_limits import RewardFailure

LARGEST = torch.finfo(torch.float32).max


def numbers(name: str, answer: Any, texts: list[str]) -> list[float]:
    """The answer as a list of finite numbers, one a text.

    Raises:
        RewardFailure: it is none; the message names the reward, the row and what was got.
    """
    if isinstance(answer, Tensor) or hasattr(answer, "tolist"):
        answer = answer.tolist()
    if not isinstance(answer, (list, tuple)):
        raise RewardFailure(
            f"reward {name!r} returned {answer!r:.80}; it must return a list of one number for "
            f"each of the {len(texts)} images"
        )
    if len(answer) != len(texts):
        raise RewardFailure(
            f"reward {name!r} returned {len(answer)} numbers for {len(texts)} images; "
            "it must return one for each, in order"
        )
    return [_number(name, value, row, texts[row]) for row, value in enumerate(answer)]


def _number(name: str, value: Any, row: int, text: str) -> float:
    where = f"reward {name!r}, row {row} (prompt {text!r:.80})"
    if hasattr(value, "item"):
        value = value.item()  # numpy and torch scalars
    if not isinstance(value, (int, float)):
        raise RewardFailure(f"{where}: got {value!r:.80}, which is not a number")
    if not -LARGEST <= value <= LARGEST:  # nor is NaN between them
        raise RewardFailure(f"{where}: got {value!r:.80}; a reward must be finite in float32")
    return float(value)
