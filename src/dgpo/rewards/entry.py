"""One reward of a set: how it is made from a name and settings, and how it is asked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from dgpo.errors import UserError
from dgpo.media import given_to_rewards
from dgpo.registry import resolve
from dgpo.rewards.call_limits import Guard
from dgpo.rewards.checking import numbers
from dgpo.rewards.group_wise import Ranked
from dgpo.rewards.settings import RewardSettings, settings_of

RewardFunction = Callable[..., Sequence[float]]
"""``(images: list[PIL.Image], prompts: list[str], **columns: list) -> list[float]``, or less:
metadata columns that the function does not name are not passed unless it takes ``**kwargs``."""


@dataclass(frozen=True)
class Entry:
    """A reward, its weight and what it accepts."""

    name: str
    function: RewardFunction
    weight: float
    columns: frozenset[str] | None
    """Names that the function accepts; None: any."""
    term: RewardSettings
    guard: Guard

    @property
    def group_wise(self) -> bool:
        """Whether it compares the pictures of a group with each other."""
        return _group_wise(self.function)

    def tell(self, what: str, *arguments: Any) -> None:
        """Call a method that it may have."""
        method = getattr(self.function, what, None)
        if method is not None:
            method(*arguments)

    def ask(
        self,
        function: RewardFunction,
        images: list[Image.Image],
        texts: list[str],
        columns: dict[str, list[Any]],
    ) -> Tensor:
        """What it says of B pictures, checked: float32 [B].

        Args:
            function: its own, or the one for pictures that are in no group.
            images, texts, columns: B of each.

        Raises:
            RewardFailure: there is no usable answer after all tries.
        """
        return self.guard(lambda: self._numbers(function, images, texts, columns))

    def _numbers(
        self,
        function: RewardFunction,
        images: list[Image.Image],
        texts: list[str],
        columns: dict[str, list[Any]],
    ) -> Tensor:
        images, columns = given_to_rewards(images, columns)
        if self.columns is not None:
            columns = {key: column for key, column in columns.items() if key in self.columns}
        # given by position: a metadata column called "images" must not collide with the argument
        clash = {"images", "prompts"} & columns.keys()
        if clash:
            raise UserError(
                f"prompt rows have a column {min(clash)!r}; rename it: rewards use the name"
            )
        answer = function(images, texts, **columns)
        return torch.tensor(numbers(self.name, answer, texts), dtype=torch.float32)


def entry_of(reward: Any, given: Any) -> Entry:
    """The entry of a name or function, with its weight or the settings of a RewardSettings.

    Raises:
        UserError: an unknown name, settings that it does not take, or no function of pictures.
    """
    if isinstance(reward, str):
        name, term = reward, settings_of(reward, given)
        function = resolve("reward", term.use or reward)
    else:
        name, function = getattr(reward, "__name__", type(reward).__name__), reward
        term = settings_of(name, given)
    if inspect.isclass(function):
        function = _made(name, function, term.options)
    elif term.options:
        raise UserError(f"rewards.{name}.options: {name!r} takes none, as it is no class")
    if not callable(function):
        raise UserError(f"reward {name!r} is {function!r}, not a function (images, prompts, ...)")
    if term.rank and _group_wise(function):
        raise UserError(f"rewards.{name}.rank: {name!r} compares the group already; leave it out")
    if term.rank:
        function = Ranked(cast(RewardFunction, function))
    called = cast(RewardFunction, function)
    return Entry(name, called, term.weight, _columns(name, called), term, Guard(name, term))


def _made(name: str, kind: type, options: Mapping[str, Any]) -> Any:
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        raise UserError(f"rewards.{name}.options: {error}; {kind.__name__} takes them") from error
    return kind(**options)


def _columns(name: str, function: RewardFunction) -> frozenset[str] | None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return None  # a builtin without a signature: hand it everything
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise UserError(f"reward {name!r} must take (images, prompts, **metadata columns)")
    return frozenset(p.name for p in parameters) - {p.name for p in positional[:2]}


def _group_wise(function: Any) -> bool:
    return bool(getattr(function, "group_wise", False))
