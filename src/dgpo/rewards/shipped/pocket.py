"""Rewards of the pocket scenes: the exact verifier's soft score and its strict verdict.

Licence: this project's own. Range [0, 1], higher is better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dgpo.errors import UserError
from dgpo.pictures import rgb
from dgpo.pocket.scenes import SIDE, parse_caption
from dgpo.pocket.verifier import Verdict, judge, verify
from dgpo.rewards.reward import Media
from dgpo.rewards.rows import RowReward


class PocketGenEval(RowReward):
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

    def wish(self, where: str, prompt: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """GenEval's clauses of a row.

        Raises:
            UserError: its ``include`` is no list of clauses, or its caption describes no scene.
        """
        include = row.get("include")
        try:
            if not include:
                return parse_caption(prompt)
            judge([], {"include": include})
        except ValueError as error:
            raise UserError(f"reward {self.name!r}, {where}: {error}") from error
        except (KeyError, TypeError, IndexError, ZeroDivisionError, AttributeError) as error:
            raise UserError(
                f"reward {self.name!r}, {where}: include = {include!r:.120} is "
                'not a list of clauses such as {"class": "circle", "count": 1, '
                '"color": "red", "position": ["left of", 1]}'
            ) from error
        return {"include": include}

    def score(self, images: Media, wishes: list[Any]) -> list[float]:
        """One score for each picture, RGB, 32 x 32 pixels.

        Raises:
            UserError: a picture has another size.
        """
        for row, image in enumerate(images):
            if image.size != (SIDE, SIDE):
                raise UserError(
                    f"reward {self.name!r} reads {SIDE} x {SIDE} pictures of the pocket model, "
                    f"row {row} is {image.width} x {image.height}; use another reward for it"
                )
        pixels = (np.asarray(rgb(image)) for image in images)
        return [self._value(verify(*pair)) for pair in zip(pixels, wishes, strict=True)]


pocket_geneval = PocketGenEval("pocket_geneval", lambda verdict: verdict.soft)
"""The share of a caption's clauses that the picture meets: dense, so that groups have spread."""
pocket_geneval_strict = PocketGenEval(
    "pocket_geneval_strict", lambda verdict: float(verdict.strict)
)
"""1 where everything asked for is in the picture and nothing else, else 0."""
