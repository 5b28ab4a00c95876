"""Rewards around other ones: the place within a group, and a model that is loaded when used."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dgpo.rewards.reward import FACTS, HOOKS, Media, Reward, Texts, as_reward


class _Inner:
    """A hook of a wrapper: the one of the reward inside."""

    def __init__(self, hook: str) -> None:
        self._hook = hook

    def __get__(self, wrapper: Wrapper | None, kind: type | None = None) -> Any:
        return self if wrapper is None else getattr(wrapper.inner, self._hook)


class Wrapper(Reward):
    """A reward around another one: a hook that a subclass does not write is the inner one's."""

    def __init__(self, inner: Reward) -> None:
        self.inner = inner

    def __init_subclass__(cls, **given: Any) -> None:
        """Facts come from the reward inside, not from the wrapper's own class."""

    @functools.cached_property
    def inner(self) -> Reward:
        """The reward inside."""
        raise NotImplementedError

    def __call__(self, images: Media, prompts: Texts, **columns: Any) -> Sequence[float]:
        return self.inner(images, prompts, **columns)


for _hook in HOOKS:
    setattr(Wrapper, _hook, _Inner(_hook))


class Ranked(Wrapper):
    """The place within the group instead of the number: 0 for the worst picture, 1 for the best.

    Outliers and the unit of the reward lose their influence. Equal numbers share the mean of their
    places. Pictures that are in no group get the number itself.

    >>> Ranked(lambda images, prompts: [0.2, 9e9, 0.1])([None] * 3, ["a cat"] * 3)
    [0.5, 1.0, 0.0]

    Args:
        reward: whatever may be given as a reward.
    """

    group_wise = True

    def __init__(self, reward: Any) -> None:
        super().__init__(as_reward(reward))
        self.name = f"ranked_{self.inner.name}"

    def __call__(self, images: Media, prompts: Texts, **columns: Any) -> list[float]:
        numbers = [float(value) for value in self.inner(images, prompts, **columns)]
        if len(numbers) < 2 or any(value != value for value in numbers):
            return numbers  # too few, or NaN: for the caller to refuse
        below = [sum(other < value for other in numbers) for value in numbers]
        equal = [numbers.count(value) - 1 for value in numbers]
        return [(b + e / 2) / (len(numbers) - 1) for b, e in zip(below, equal, strict=True)]


class Lazy(Wrapper):
    """A reward that is built when it is first checked or called.

    A recipe's names must cost nothing until they are used, and a download that fails must do so
    before the run starts: the trainer checks all rewards first.

    Args:
        kind: the reward's class, called without arguments; it says what is known before.
    """

    def __init__(self, kind: type[Reward]) -> None:
        self._kind = kind
        self._folder: Path | None = None
        for fact in FACTS:
            setattr(self, fact, getattr(kind, fact))

    @functools.cached_property
    def inner(self) -> Reward:
        """The reward itself.

        Raises:
            UserError: it cannot be loaded.
        """
        reward = self._kind()
        if self._folder is not None:
            reward.run_in(self._folder)
        return reward

    @property
    def built(self) -> bool:
        """Return whether the reward has been built."""
        return "inner" in vars(self)

    def run_in(self, folder: Path) -> None:
        """Tell the reward, now or when it is built."""
        self._folder = folder
        if self.built:
            self.inner.run_in(folder)

    def close(self) -> None:
        """Close the reward if it has been built."""
        if self.built:
            self.inner.close()

    def modules(self) -> list[nn.Module]:
        """The networks of the reward if it has been built."""
        return list(self.inner.modules()) if self.built else []
