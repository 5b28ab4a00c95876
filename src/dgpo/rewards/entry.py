"""One reward of a set: how it is made from a name and settings, and how its answer is checked."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgpo.errors import UserError, told
from dgpo.media import given_to_rewards
from dgpo.prompts import Prompt
from dgpo.registry import resolve
from dgpo.rewards.call_limits import CallLimits
from dgpo.rewards.reward import Reward, RewardFailure, as_reward, name_of
from dgpo.rewards.settings import RewardSettings, settings_of
from dgpo.rewards.wrappers import Ranked
from dgpo.user_code import own, user_code

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

        def ask() -> list[float]:
            how = self.reward if grouped else self.reward.alone
            pictures, prompts, given = self.given(images, texts, columns)
            return numbers(self.name, how(pictures, prompts, **given), texts)

        return torch.tensor(self.limits(ask), dtype=torch.float32)

    def tell(self, hook: str, /, *given: Any, **columns: Any) -> None:
        """Call one of the reward's other hooks.

        Raises:
            UserError: the hook raised; the reward is named.
        """
        try:
            with user_code(f"reward {self.name!r}"):
                getattr(self.reward, hook)(*given, **columns)
        except UserError:
            raise
        except Exception as error:
            what = "its check of no prompts" if given == ([],) else f"its {hook}"
            raise UserError(f"reward {self.name!r}: {what} raised {told(error)}") from error

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Let the reward refuse rows that it cannot score. What they say is copied for it.

        Raises:
            UserError: for such a row, or a column that the reward needs and no row has.
        """
        there = {key for row in prompts for key in row.metadata} | {"sampling_rate"}
        if prompts and (lacking := sorted(self.reward.needs - there)):
            has = ", ".join(sorted(there - {"sampling_rate"})) or "no columns"
            raise UserError(
                f"reward {self.name!r} needs the column {lacking[0]!r}, and the prompt rows have "
                f"{has}: add it to them, or give the parameter a default"
            )
        self.tell("check", [replace(row, metadata=own(row.metadata)) for row in prompts])

    def given(
        self,
        images: Sequence[Any],
        texts: Sequence[str],
        columns: Mapping[str, list[Any]],
        all_columns: bool = False,
    ) -> tuple[list[Any], list[str], dict[str, list[Any]]]:
        """What the reward is given for B pictures: copies, which are its own at every try, so that
        no reward sees what another one has drawn or cleared.

        Args:
            images, texts, columns: B of each.
            all_columns: whether it is given the columns that it does not ask for, too.

        Raises:
            UserError: a column has the name of an argument.
        """
        media, columns = given_to_rewards(images, dict(columns))
        wanted = None if all_columns else self.reward.columns
        if wanted is not None:
            columns = {key: column for key, column in columns.items() if key in wanted}
        # given by position: a metadata column called "images" must not collide with the argument
        clash = {"images", "prompts"} & columns.keys()
        if clash:
            raise UserError(
                f"prompt rows have a column {min(clash)!r}; rename it: rewards use the name"
            )
        # a caption would hold its pictures, which the model is given too
        return own(media), [str(text) for text in texts], own(columns)


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
    with user_code(f"reward {name!r}"):
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
