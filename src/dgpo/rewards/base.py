"""A weighted set of rewards, whose answers are checked before they are believed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor

from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.registry import resolve

RewardFunction = Callable[..., Sequence[float]]
"""``(images: list[PIL.Image], prompts: list[str], **columns: list) -> list[float]``, or less:
metadata columns that the function does not name are not passed unless it takes ``**kwargs``."""


class Scores(NamedTuple):
    """What a :class:`RewardSet` returns; unpacks as ``by_name, total = rewards(...)``."""

    by_name: dict[str, Tensor]
    """Each reward's own numbers, float32 [B], unweighted."""
    total: Tensor
    """Their weighted sum, float32 [B]."""


@dataclass(frozen=True)
class _Entry:
    name: str
    function: RewardFunction
    weight: float
    columns: frozenset[str] | None
    """Names that the function accepts; None: any."""


def load_rewards(
    spec: Mapping[str, float] | Sequence[str | RewardFunction] | str | RewardFunction,
) -> RewardSet:
    """Look rewards up and import them.

    Args:
        spec: ``{name: weight}`` as in a recipe, or one or several names or functions (weight 1).

    Raises:
        UserError: no reward, an unknown name, a weight of 0, the same name twice, or something
            that cannot be called as a reward.
    """
    if isinstance(spec, Mapping):
        pairs: list[tuple[Any, float]] = list(spec.items())
    elif isinstance(spec, str) or callable(spec):
        pairs = [(spec, 1.0)]
    else:
        pairs = [(one, 1.0) for one in spec]
    if not pairs:
        raise UserError("rewards: none given; for example rewards: {pocket_geneval: 1.0}")
    return RewardSet([_entry(reward, weight) for reward, weight in pairs])


def _entry(reward: Any, weight: float) -> _Entry:
    if isinstance(reward, str):
        name, function = reward, resolve("reward", reward)
    else:
        name, function = getattr(reward, "__name__", type(reward).__name__), reward
    if inspect.isclass(function):
        function = function()
    if not callable(function):
        raise UserError(f"reward {name!r} is {function!r}, not a function (images, prompts, ...)")
    if not math.isfinite(weight) or weight == 0:
        raise UserError(f"rewards.{name} = {weight}: a weight is a finite number other than 0")
    called = cast(RewardFunction, function)
    return _Entry(name, called, float(weight), _columns(name, called))


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


class RewardSet:
    """Several rewards and their weights, called as one."""

    def __init__(self, entries: Sequence[_Entry]) -> None:
        self._entries = tuple(entries)
        names = self.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"rewards: {', '.join(twice)} given twice; give each its own name")

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self._entries]

    @property
    def weights(self) -> dict[str, float]:
        return {entry.name: entry.weight for entry in self._entries}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Let every reward refuse prompts that it cannot score, before the run starts.

        Raises:
            UserError: as the reward says.
        """
        for entry in self._entries:
            check = getattr(entry.function, "check", None)
            if check is not None:
                check(list(prompts))

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score images.

        Args:
            images: B of them.
            prompts: the prompt row of each, B.

        Raises:
            UserError: a reward's answer is not B finite numbers (it names the reward and row).
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        texts = [prompt.text for prompt in prompts]
        keys = dict.fromkeys(key for prompt in prompts for key in prompt.metadata)
        columns = {key: [prompt.column(key) for prompt in prompts] for key in keys}
        by_name = {e.name: _call(e, list(images), texts, columns) for e in self._entries}
        total = torch.stack([e.weight * by_name[e.name].double() for e in self._entries]).sum(0)
        return Scores(by_name, total.float())


def _call(
    entry: _Entry, images: list[Image.Image], texts: list[str], columns: dict[str, list[Any]]
) -> Tensor:
    if entry.columns is not None:
        columns = {key: column for key, column in columns.items() if key in entry.columns}
    # given by position: a metadata column called "images" must not collide with the argument
    clash = {"images", "prompts"} & columns.keys()
    if clash:
        raise UserError(
            f"prompt rows have a column {min(clash)!r}; rename it: rewards use the name"
        )
    answer = entry.function(images, texts, **columns)
    return torch.tensor(_numbers(entry.name, answer, texts), dtype=torch.float32)


def _numbers(name: str, answer: Any, texts: list[str]) -> list[float]:
    if isinstance(answer, Tensor) or hasattr(answer, "tolist"):
        answer = answer.tolist()
    if not isinstance(answer, (list, tuple)):
        raise UserError(
            f"reward {name!r} returned {answer!r:.80}; it must return a list of one number for "
            f"each of the {len(texts)} images"
        )
    if len(answer) != len(texts):
        raise UserError(
            f"reward {name!r} returned {len(answer)} numbers for {len(texts)} images; "
            "it must return one for each, in order"
        )
    return [_number(name, value, row, texts[row]) for row, value in enumerate(answer)]


def _number(name: str, value: Any, row: int, text: str) -> float:
    where = f"reward {name!r}, row {row} (prompt {text!r:.80})"
    if hasattr(value, "item"):
        value = value.item()  # numpy and torch scalars
    if not isinstance(value, (int, float)):
        raise UserError(f"{where}: got {value!r:.80}, which is not a number")
    if not math.isfinite(value):
        raise UserError(f"{where}: got {value}; a reward must be finite")
    return float(value)
