"""One reward of a set: how it is made from a name and settings, and how its answer is checked."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgpo.errors import UserError
from dgpo.media import given_to_rewards
from dgpo.registry import resolve
from dgpo.rewards.call_limits import CallLimits
from dgpo.rewards.reward import Reward, RewardFailure, as_reward, name_of
from dgpo.rewards.settings import RewardSettings, settings_of
from dgpo.rewards.wrappers import Ranked

LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Entry:
    """A reward as a run names and asks it."""

    name: str
    reward: Reward
    settings: RewardSettings
    limits: CallLimits
    source: str = ""
    """The SHA-256 of the file that defines the user's own reward; empty where there is none."""

    def ask(
        self, images: list[Any], texts: list[str], columns: dict[str, list[Any]], grouped: bool
    ) -> Tensor:
        """What the reward says of B pictures, checked: float32 [B].

        Args:
            images, texts, columns: B of each.
            grouped: whether the pictures are whole groups; else they are in none.

        Raises:
            RewardFailure: there is no usable answer after all tries.
        """
        return self.limits(lambda: self._numbers(images, texts, columns, grouped))

    def _numbers(
        self, images: list[Any], texts: list[str], columns: dict[str, list[Any]], grouped: bool
    ) -> Tensor:
        images, columns = given_to_rewards(images, columns)
        wanted = self.reward.columns
        if wanted is not None:
            columns = {key: column for key, column in columns.items() if key in wanted}
        # given by position: a metadata column called "images" must not collide with the argument
        clash = {"images", "prompts"} & columns.keys()
        if clash:
            raise UserError(
                f"prompt rows have a column {min(clash)!r}; rename it: rewards use the name"
            )
        ask = self.reward if grouped else self.reward.alone
        answer = numbers(self.name, ask(images, texts, **columns), texts)
        return torch.tensor(answer, dtype=torch.float32)


def entry_of(given: Any, how: Any) -> Entry:
    """The entry of a name or of whatever may be given as a reward.

    Args:
        given: the reward.
        how: its weight, or its settings.

    Raises:
        UserError: an unknown name, settings that it does not take, or no function of pictures.
    """
    name = given if isinstance(given, str) else name_of(given)
    settings = settings_of(name, how)
    if isinstance(given, str):
        given = resolve("reward", settings.use or name)
    source = _source(given)
    reward = as_reward(given, name, settings.options)
    if settings.rank:
        if reward.group_wise:
            raise UserError(
                f"rewards.{name}.rank: {name!r} compares the group already; leave it out"
            )
        reward = Ranked(reward)
    return Entry(name, reward, settings, CallLimits(name, settings), source)


def _source(given: Any) -> str:
    made = given if hasattr(given, "__qualname__") else type(given)
    module = inspect.getmodule(made)
    file = getattr(module, "__file__", None)
    if file is None or str(getattr(module, "__name__", "")).partition(".")[0] == "dgpo":
        return ""  # a notebook's, or the package's, whose version run.json holds
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return ""  # it is gone, and the function is there all the same


def numbers(name: str, answer: Any, texts: list[str]) -> list[float]:
    """A reward's answer as a list of finite numbers, one for each text.

    Raises:
        RewardFailure: it is none; the message names the reward, the row and what was got.
    """
    if hasattr(answer, "tolist"):  # an array or a tensor
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
