"""What a person says of a group of pictures, and the rewards that it makes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Kind: TypeAlias = Literal["likes", "order", "stars"]
"""How people are asked."""
KINDS: tuple[Kind, ...] = ("likes", "order", "stars")
STARS = 5

_Place = Annotated[int, Field(ge=0, strict=True)]


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Likes(_Answer):
    """Names the pictures that please, by their places in the group."""

    kind: Literal["likes"] = "likes"
    liked: list[_Place]


class Order(_Answer):
    """Orders places in the group, the best first; those that are not named tie behind them."""

    kind: Literal["order"] = "order"
    best_first: list[_Place]


class Stars(_Answer):
    """Gives every picture of the group 1 to 5 stars."""

    kind: Literal["stars"] = "stars"
    stars: list[Annotated[int, Field(ge=1, le=STARS, strict=True)]]


class Skip(_Answer):
    """Has no opinion of this group."""

    kind: Literal["skip"] = "skip"


Answer: TypeAlias = Annotated[Likes | Order | Stars | Skip, Field(discriminator="kind")]
ANSWER: TypeAdapter[Answer] = TypeAdapter(Answer)
"""Reads and checks answers as JSON."""


def rewards_of(answer: Answer, size: int) -> list[float] | None:
    """The reward of each picture, in [0, 1]; None for no opinion.

    Liked pictures get 1, others 0. An order gives each picture the share of the others that lie
    behind it, and pictures that tie the mean of their places. Stars s give ``(s - 1) / 4``.

    >>> rewards_of(Order(best_first=[2, 0]), size=4)
    [0.6666666666666666, 0.16666666666666666, 1.0, 0.16666666666666666]

    Args:
        answer: what a person says of a group.
        size: how many pictures the group has, 2 or more.

    Raises:
        ValueError: the answer names pictures that are not there, one twice, or not all.
    """
    if isinstance(answer, Skip):
        return None
    if isinstance(answer, Likes):
        _check(answer.liked, size)
        return [float(place in answer.liked) for place in range(size)]
    if isinstance(answer, Order):
        best = answer.best_first
        _check(best, size)
        behind = {place: size - 1 - rank for rank, place in enumerate(best)}
        tied = (size - len(best) - 1) / 2
        return [behind.get(place, tied) / (size - 1) for place in range(size)]
    if len(answer.stars) != size:
        raise ValueError(f"{len(answer.stars)} pictures have stars, the group has {size}")
    return [(stars - 1) / (STARS - 1) for stars in answer.stars]


def mean(rewards: Iterable[list[float]]) -> list[float]:
    """The mean of several raters' rewards, picture by picture."""
    return [sum(column) / len(column) for column in zip(*rewards, strict=True)]


def _check(places: list[int], size: int) -> None:
    if len(set(places)) != len(places):
        raise ValueError(f"a picture is named twice: {places}")
    if places and max(places) >= size:
        raise ValueError(f"there is no picture {max(places)} in a group of {size}")
