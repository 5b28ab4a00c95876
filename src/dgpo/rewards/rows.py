"""Rewards whose prompt rows say what a picture should show: read alike before a run and in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dgpo.prompts import Prompt
from dgpo.rewards.reward import Media, Reward, Texts


class RowReward(Reward):
    """A reward that reads a wish from each prompt row, and scores a picture by it.

    A subclass writes :meth:`wish` and :meth:`score`.
    """

    def wish(self, where: str, prompt: str, row: Mapping[str, Any]) -> Any:
        """Read from a row what its picture should show.

        Args:
            where: what an error calls the row.
            prompt: its text.
            row: its columns.

        Raises:
            UserError: the row does not say it.
        """
        raise NotImplementedError

    def score(self, images: Media, wishes: list[Any]) -> list[float]:
        """One score for each picture and its wish."""
        raise NotImplementedError

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse rows without a wish.

        Raises:
            UserError: see :meth:`wish`.
        """
        for number, prompt in enumerate(prompts):
            self.wish(prompt.place(number), prompt.text, prompt.metadata)

    def __call__(self, images: Media, prompts: Texts, **columns: Any) -> list[float]:
        """One score for each picture.

        Raises:
            UserError: see :meth:`wish`.
        """
        wishes = []
        for number, text in enumerate(prompts):
            row = {key: column[number] for key, column in columns.items() if column is not None}
            wishes.append(self.wish(f"prompt row {number}", text, row))
        return self.score(images, wishes)
