"""Rewards of the pocket scenes: the exact verifier's soft score and its strict verdict.

Licence: this project's own. Range [0, 1], higher is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dgpo.errors import UserError
from dgpo.pocket.scenes import SIDE, parse_caption
from dgpo.pocket.verifier import Verdict, judge, verify
from dgpo.prompts import Prompt
from dgpo.rewards.reward import Reward


class PocketGenEval(Reward):
    """Scores pictures of coloured shapes against their captions.

    A row's ``include`` (GenEval's clauses) says what a picture should show; where a row has none,
    the caption itself is read.

    Args:
        name: what errors call it.
        value: takes the wanted number from a verdict.
    """

    def __init__(self, name: str, value: Callable[[Verdict], float]) -> None:
        self.name = name
        self._value = value

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse captions that describe no scene and clauses that are not GenEval's.

        Raises:
            UserError: there is such a row.
        """
        for row, prompt in enumerate(prompts):
            include = prompt.metadata.get("include")
            if not include:
                _parse(self.name, prompt.place(row), prompt.text)
                continue
            try:
                judge([], {"include": include})
            except (KeyError, TypeError, IndexError, ZeroDivisionError, AttributeError) as error:
                raise UserError(
                    f"reward {self.name!r}, {prompt.place(row)}: include = {include!r:.120} is "
                    'not a list of clauses such as {"class": "circle", "count": 1, '
                    '"color": "red", "position": ["left of", 1]}'
                ) from error

    def __call__(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        include: Sequence[list[dict[str, Any]] | None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """One score for each picture.

        Args:
            images: RGB, 32 x 32 pixels.
            prompts: their captions.
            include: GenEval's clauses of each row, or None to read the caption.

        Raises:
            UserError: a picture has another size, or a caption describes no scene.
        """
        clauses = include if include is not None else [None] * len(prompts)
        scores = []
        for row, (image, text, wanted) in enumerate(zip(images, prompts, clauses, strict=True)):
            if image.size != (SIDE, SIDE):
                raise UserError(
                    f"reward {self.name!r} reads {SIDE} x {SIDE} pictures of the pocket model, "
                    f"row {row} is {image.width} x {image.height}; use another reward for it"
                )
            metadata = (
                {"include": wanted} if wanted else _parse(self.name, f"prompt row {row}", text)
            )
            scores.append(self._value(verify(np.asarray(image.convert("RGB")), metadata)))
        return scores


def _parse(name: str, where: str, text: str) -> dict[str, Any]:
    try:
        return parse_caption(text)
    except ValueError as error:
        raise UserError(f"reward {name!r}, {where}: {error}") from error


pocket_geneval = PocketGenEval("pocket_geneval", lambda verdict: verdict.soft)
"""The share of a caption's clauses that the picture meets: dense, so that groups have spread."""
pocket_geneval_strict = PocketGenEval(
    "pocket_geneval_strict", lambda verdict: float(verdict.strict)
)
"""1 where everything asked for is in the picture and nothing else, else 0."""
