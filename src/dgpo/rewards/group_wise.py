"""Rewards that compare the pictures of a group with each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image


class Ranked:
    """A reward by the place within the group: 0 for the worst picture, 1 for the best.

    Outliers and the unit of the reward lose their influence. Equal numbers share the mean of their
    places. A reward is called once for each group if its attribute ``group_wise`` is true, as it is
    here; its ``alone`` scores pictures that are in no group, such as held-out ones.

    Args:
        reward: ``(images, prompts, **columns) -> list of numbers``.
    """

    group_wise = True

    def __init__(self, reward: Callable[..., Sequence[float]]) -> None:
        self.alone = reward
        self.__name__ = f"ranked_{getattr(reward, '__name__', type(reward).__name__)}"
        self.__wrapped__ = reward  # so that the columns it names are those of the reward

    def check(self, prompts: Sequence[Any]) -> None:
        """As the reward's own."""
        check = getattr(self.alone, "check", None)
        if check is not None:
            check(prompts)

    def __call__(
        self, images: list[Image.Image], prompts: list[str], **columns: list
    ) -> list[float]:
        answer: Any = self.alone(images, prompts, **columns)
        numbers = [float(value) for value in answer]
        if len(numbers) < 2 or any(value != value for value in numbers):
            return numbers  # too few, or NaN: for the caller to refuse
        below = [sum(other < value for other in numbers) for value in numbers]
        equal = [numbers.count(value) - 1 for value in numbers]
        return [(b + e / 2) / (len(numbers) - 1) for b, e in zip(below, equal, strict=True)]
