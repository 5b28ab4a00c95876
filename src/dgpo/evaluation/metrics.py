"""A metric is a reward that judges each picture, or a figure of a whole set such as KID."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.prompts.prompts import columns_of
from dgpo.rewards import RewardSet, load_rewards
from dgpo.rewards.entry import Entry, entry_of


class Interval(NamedTuple):
    """An ``Interval`` is a figure with its 95% confidence interval."""

    value: float
    low: float
    high: float


class Metrics:
    """``Metrics`` are looked up and imported once, and asked in order.

    Args:
        metrics: names or functions of rewards, or a :class:`RewardSet` whose rewards are the
            metrics. A metric with a true attribute ``of_set`` is called once for all pictures:
            ``(images, prompts, **columns) -> (value, low, high)``.

    Raises:
        UserError: there is no metric, a name is unknown, or a name stands twice.
    """

    def __init__(self, metrics: RewardSet | Sequence[str | Callable]) -> None:
        self._each: RewardSet | None = None
        self._of_set: list[Entry] = []
        self.names: list[str] = []
        """The names of all metrics, in the order given."""
        if isinstance(metrics, RewardSet):
            self._each, self.names = metrics, metrics.names
            return
        each: list[Entry] = []
        for metric in metrics:
            entry = entry_of(metric, 1.0)
            if entry.name in self.names:
                raise UserError(
                    f"eval.metrics: {entry.name!r} is given twice; give each its own name"
                )
            self.names.append(entry.name)
            (self._of_set if entry.reward.of_set else each).append(entry)
        if each or not self._of_set:
            self._each = RewardSet(each) if each else load_rewards([])

    @property
    def names_of_each(self) -> list[str]:
        """Return the names of the metrics that judge each picture."""
        return [] if self._each is None else self._each.names

    @property
    def sources(self) -> dict[str, str]:
        """Return the SHA-256 of the file of each metric that is the user's own, by its name."""
        of_set = {metric.name: metric.source for metric in self._of_set if metric.source}
        return of_set | ({} if self._each is None else self._each.sources)

    @property
    def has_of_set(self) -> bool:
        """Return whether there is a metric of the whole set."""
        return bool(self._of_set)

    def offload(self) -> None:
        """Call :meth:`RewardSet.offload`; a metric of a whole set stays where it is."""
        if self._each is not None:
            self._each.offload()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Let every metric refuse prompts that it cannot score.

        Raises:
            UserError: a metric refuses a prompt.
        """
        if self._each is not None:
            self._each.check(prompts)
        for metric in self._of_set:
            metric.check(prompts)

    def of_each(
        self, images: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> dict[str, Tensor]:
        """Ask the metrics of single pictures: [B] numbers each.

        Raises:
            UserError: an answer is not B finite numbers.
        """
        return {} if self._each is None else self._each(images, prompts).by_name

    def of_set(
        self, images: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> dict[str, Interval]:
        """Ask the metrics of the whole set.

        Raises:
            UserError: an answer is not (value, low, high).
        """
        texts, columns = [prompt.text for prompt in prompts], columns_of(prompts)
        found = {}
        for metric in self._of_set:
            found[metric.name] = metric.limits(
                lambda metric=metric: _interval(metric, metric.given(images, texts, columns))
            )
        return found


def _interval(metric: Entry, given: tuple[list[Any], list[str], dict[str, list[Any]]]) -> Interval:
    images, texts, columns = given
    answer: Any = metric.reward(images, texts, **columns)
    with suppress(TypeError, ValueError, RuntimeError):
        found = Interval(*map(float, answer))
        if all(map(math.isfinite, found)):
            return found
    raise UserError(
        f"metric {metric.name!r} returned {answer!r:.80}; a metric of a whole set returns "
        "(value, low, high), three finite numbers"
    )
