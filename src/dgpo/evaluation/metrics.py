"""Metrics: rewards that judge each picture, and figures of the whole set, such as KID."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.registry import resolve
from dgpo.rewards import RewardSet, load_rewards


class Interval(NamedTuple):
    """A figure and its 95% confidence interval."""

    value: float
    low: float
    high: float


class Metrics:
    """Metrics in the order given, looked up and imported once.

    Args:
        metrics: reward names or functions, or a :class:`RewardSet` whose rewards are the metrics. A
            metric whose attribute ``of_set`` is true is called once for all pictures,
            ``(images, prompts, **columns) -> (value, low, high)``.

    Raises:
        UserError: there is no metric, a name is unknown, or a name comes twice.
    """

    def __init__(self, metrics: RewardSet | Sequence[str | Callable]) -> None:
        self._each: RewardSet | None = None
        self._of_set: dict[str, Callable[..., Sequence[float]]] = {}
        self.names: list[str] = []
        """The names of all metrics, in the order given."""
        if isinstance(metrics, RewardSet):
            self._each, self.names = metrics, metrics.names
            return
        each: list[str | Callable] = []
        for metric in metrics:
            found: Any = resolve("reward", metric) if isinstance(metric, str) else metric
            name = metric if isinstance(metric, str) else _name(metric)
            if name in self.names:
                raise UserError(f"eval.metrics: {name!r} given twice; give each its own name")
            self.names.append(name)
            if getattr(found, "of_set", False):
                function: Any = found() if inspect.isclass(found) else found
                self._of_set[name] = function
            else:
                each.append(metric)
        if each or not self._of_set:
            self._each = load_rewards(each)

    @property
    def names_of_each(self) -> list[str]:
        """The names of the metrics that judge each picture."""
        return [] if self._each is None else self._each.names

    @property
    def has_of_set(self) -> bool:
        """Whether there is a metric of the whole set."""
        return bool(self._of_set)

    def offload(self) -> None:
        """Offload as :meth:`RewardSet.offload`; a metric of the whole set stays where it is."""
        if self._each is not None:
            self._each.offload()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Let every metric refuse prompts that it cannot score.

        Raises:
            UserError: a metric refuses them.
        """
        if self._each is not None:
            self._each.check(prompts)
        for metric in self._of_set.values():
            check = getattr(metric, "check", None)
            if check is not None:
                check(list(prompts))

    def of_each(
        self, images: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> dict[str, Tensor]:
        """Ask the metrics of single pictures about B pictures; returns [B] for each.

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
        texts = [prompt.text for prompt in prompts]
        keys = dict.fromkeys(key for prompt in prompts for key in prompt.metadata)
        columns = {key: [prompt.metadata.get(key) for prompt in prompts] for key in keys}
        found = {}
        for name, metric in self._of_set.items():
            answer = metric(list(images), texts, **_accepted(metric, columns))
            if not isinstance(answer, (tuple, list)) or len(answer) != 3:
                raise UserError(
                    f"metric {name!r} returned {answer!r:.80}; a metric of the whole set returns "
                    "(value, low, high)"
                )
            found[name] = Interval(*map(float, answer))
        return found


def _name(metric: Callable) -> str:
    return getattr(metric, "__name__", type(metric).__name__)


def _accepted(metric: Callable, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    parameters = inspect.signature(metric).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return columns
    return {key: column for key, column in columns.items() if key in list(parameters)[2:]}
