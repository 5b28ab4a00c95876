"""The desk between those who rank and whoever waits: groups come in a queue, answers go out."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from PIL import Image

from dgpo.ranking.agreement import Agreement, agreement
from dgpo.ranking.answers import Answer, mean
from dgpo.ranking.store import Group, Store

LEASE = 120.0
"""How many seconds a group that is shown to somebody is offered to others last."""
_TICK = 0.5
"""After how many seconds a waiting thread looks up, so that Ctrl-C is heard."""


@dataclass(frozen=True)
class State:
    """How far the ranking is.

    Args:
        ranked: how many groups each rater has answered, by name.
        waiting: how many groups wait for answers.
        agreement: how far all raters agree.
        note: what the page tells people when nothing waits.
    """

    ranked: dict[str, int]
    waiting: int
    agreement: Agreement
    note: str


class Desk:
    """Gives groups to raters and their answers to whoever asked.

    Args:
        store: keeps all of it.
        raters: how many different people rank each group.
    """

    def __init__(self, store: Store, raters: int = 1) -> None:
        self.store, self.raters = store, raters
        self.note = "The model is drawing the next pictures."
        self._changed = threading.Condition(threading.RLock())
        self._open: dict[str, Group] = {}
        self._shown: dict[str, dict[str, float]] = {}
        self._used: set[str] = set()
        self._agreement = {group.id: agreement([store.rewards(group)]) for group in store.groups()}

    def post(
        self,
        prompt: str,
        images: Sequence[Image.Image],
        metadata: Mapping[str, Any] | None = None,
        place: int | None = None,
    ) -> Group:
        """Put a group into the queue, unless enough people have answered it before.

        Raises:
            UserError: see :meth:`Store.add`.
        """
        group = self.store.add(prompt, images, metadata, place)
        self._queue(group)
        return group

    def reopen(self) -> None:
        """Put all groups into the queue that were left unanswered earlier."""
        for group in self.store.groups():
            self._queue(group)

    def rewards(self, group: Group) -> list[float] | None:
        """Wait until enough people have answered, and return the mean of their rewards; None if
        nobody has an opinion."""
        with self._changed:
            while not self._done(group):
                self._changed.wait(_TICK)
            self._used.add(group.id)
            given = self.store.rewards(group)
            return mean(given.values()) if given else None

    def wait_for_room(self, most: int) -> None:
        """Wait until fewer than ``most`` groups are in the queue."""
        with self._changed:
            while len(self._open) >= most:
                self._changed.wait(_TICK)

    def wait_until_empty(self) -> None:
        """Wait until nothing is in the queue."""
        self.wait_for_room(1)

    def next(self, rater: str, most: int = 1) -> list[Group]:
        """Pick groups for a rater, the one to answer now first; those that others look at come
        last."""
        with self._changed:
            now = monotonic()
            mine = [g for g in self._open.values() if rater not in self.store.answers(g)]
            mine.sort(key=lambda group: self._others(group, rater, now) >= self._missing(group))
            for group in mine[:most]:
                self._shown.setdefault(group.id, {})[rater] = now
            return mine[:most]

    def answer(self, id: str, rater: str, answer: Answer, seconds: float | None = None) -> bool:
        """Keep an answer, and say whether it comes in time for whoever waits for the group.

        Raises:
            KeyError: there is no such group.
            ValueError: the answer does not fit the group.
        """
        with self._changed:
            group = self.store.group(id)
            self.store.answer(group, rater, answer, seconds)
            self._agreement[id] = agreement([self.store.rewards(group)])
            if self._done(group):
                self._open.pop(id, None)
                self._shown.pop(id, None)
            self._changed.notify_all()
            return id not in self._used

    def state(self) -> State:
        """Return what the page shows of the queue and of the raters."""
        with self._changed:
            together = sum(self._agreement.values(), Agreement())
            return State(self.store.counts(), len(self._open), together, self.note)

    def _queue(self, group: Group) -> None:
        with self._changed:
            if not self._done(group):
                self._open[group.id] = group

    def _done(self, group: Group) -> bool:
        return self._missing(group) <= 0

    def _missing(self, group: Group) -> int:
        return self.raters - len(self.store.answers(group))

    def _others(self, group: Group, rater: str, now: float) -> int:
        shown = self._shown.get(group.id, {})
        return sum(name != rater and now - since < LEASE for name, since in shown.items())
