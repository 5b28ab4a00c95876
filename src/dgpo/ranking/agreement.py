"""Counts how far raters agree on the groups that several of them have ranked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class Agreement:
    """How many pairs of pictures two raters order the same way, of those that both told apart.

    Args:
        same: the pairs that both order the same way.
        pairs: the pairs that both told apart; where a rater sees no difference, none is counted.
        groups: the groups with such a pair.
    """

    same: int = 0
    pairs: int = 0
    groups: int = 0

    @property
    def share(self) -> float | None:
        """The share ``same / pairs``, 0.5 by chance; None if there is no pair."""
        return self.same / self.pairs if self.pairs else None

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.same + other.same, self.pairs + other.pairs, self.groups + other.groups
        )


def agreement(groups: Iterable[Mapping[str, Sequence[float]]]) -> Agreement:
    """Add up the agreement of every two raters.

    Args:
        groups: for each group, the rewards that each rater gave, by the rater's name.
    """
    return sum((_of_group(group) for group in groups), Agreement())


def _of_group(group: Mapping[str, Sequence[float]]) -> Agreement:
    same = pairs = 0
    for one, other in combinations(group.values(), 2):
        for i, j in combinations(range(len(one)), 2):
            product = (one[i] - one[j]) * (other[i] - other[j])
            same += product > 0
            pairs += product != 0
    return Agreement(same, pairs, int(pairs > 0))
