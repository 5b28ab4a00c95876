"""A weighted set of rewards, whose answers are checked before they are believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.rewards.call_limits import RewardFailure
from dgpo.rewards.entry import Entry, RewardFunction, entry_of
from dgpo.rewards.mixing import COLUMN, routed
from dgpo.rewards.offload import Offload


class Scores(NamedTuple):
    """What a :class:`RewardSet` returns; unpacks as ``by_name, total = rewards(...)``."""

    by_name: dict[str, Tensor]
    """Each reward's own numbers, float32 [B], unweighted; NaN where a row does not ask it."""
    total: Tensor
    """Their weighted sum, float32 [B]."""


@dataclass(frozen=True)
class Scored:
    """What rewards said of pictures in groups."""

    by_name: dict[str, Tensor]
    """Each reward's own numbers, float32 [B]; NaN where it was not asked or has failed."""
    weights: Tensor
    """Of each row and reward, float64 [B, K]; 0 where it was not asked."""
    lost: dict[int, str] = field(default_factory=dict)
    """Groups that a reward has failed, and why."""


def load_rewards(
    spec: Mapping[str, Any] | Sequence[str | RewardFunction] | str | RewardFunction,
) -> RewardSet:
    """Look rewards up and import them.

    Args:
        spec: ``{name: weight}`` or ``{name: RewardSettings}`` as in a recipe, or one or
            several names or functions (weight 1).

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
    return RewardSet([entry_of(reward, weight) for reward, weight in pairs])


class RewardSet:
    """Several rewards and their weights, called as one."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = tuple(entries)
        self._residence: Offload | None = None
        names = self.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"rewards: {', '.join(twice)} given twice; give each its own name")

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self._entries]

    def names_with(self, attribute: Literal["group_wise", "asks_people"]) -> list[str]:
        """The rewards that compare the pictures of a group, or that are people."""
        return [entry.name for entry in self._entries if getattr(entry.function, attribute, False)]

    @property
    def weights(self) -> dict[str, float]:
        return {entry.name: entry.weight for entry in self._entries}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Let every reward refuse prompts that it cannot score, before the run starts.

        Raises:
            UserError: as the reward says, or a row names rewards that are not there.
        """
        asked = routed(prompts, self.weights) != 0
        for place, entry in enumerate(self._entries):
            check = getattr(entry.function, "check", None)
            mine = asked[:, place].nonzero()[:, 0].tolist()
            if check is not None and mine:
                check(prompts if len(mine) == len(prompts) else _told(prompts, mine))

    def load(self) -> None:
        """Let every reward load its model and miss what it lacks while there are no prompts yet:
        its ``check`` is asked about none.

        Raises:
            UserError: as the reward says.
        """
        for entry in self._entries:
            entry.tell("check", [])

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score images that are in no group; no failure is passed over.

        Args:
            images: B of them.
            prompts: the prompt row of each, B.

        Raises:
            UserError: a reward's answer is not B finite numbers (it names the reward and row).
        """
        scored = self.score(images, prompts)
        values = torch.stack([value.double() for value in scored.by_name.values()])
        weighted = torch.where(scored.weights.T != 0, scored.weights.T * values, 0.0)
        return Scores(scored.by_name, weighted.sum(0).float())

    def trial(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> None:
        """Score a few images as if they were a group; no failure is passed over.

        People, whose time is dear, are not asked.

        Raises:
            RewardFailure: a reward's answer is unusable.
        """
        lost = self._score(self._others(), images, prompts, [0] * len(images)).lost
        if lost:
            raise RewardFailure(lost[0])

    @property
    def media(self) -> str:
        """What its rewards score, by their attribute ``media``: pictures (default), videos, ...

        Raises:
            UserError: not the same.
        """
        found = {getattr(entry.function, "media", "pictures") for entry in self._entries}
        if len(found) != 1:
            raise UserError(f"rewards of {' and '.join(sorted(found))} cannot be asked together")
        return found.pop()

    def run_in(self, folder: Path) -> None:
        """Tell rewards that keep something where the run's folder is."""
        for entry in self._entries:
            entry.tell("run_in", folder)

    def announce(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[Prompt],
        groups: Sequence[int],
    ) -> None:
        """Let rewards that take their time see whole groups before they are asked about them.

        Args:
            as of :meth:`score`.

        Raises:
            UserError: as the reward says.
        """
        asked = routed(prompts, self.weights) != 0
        columns = _columns_of(prompts)
        for place, entry in enumerate(self._entries):
            announce = getattr(entry.function, "announce", None)
            if announce is None:
                continue
            for group in dict.fromkeys(groups):
                rows = [r for r, own in enumerate(groups) if own == group and asked[r, place]]
                mine = {key: [column[row] for row in rows] for key, column in columns.items()}
                if rows:
                    announce([images[r] for r in rows], [prompts[r].text for r in rows], **mine)

    def offload(self) -> None:
        """From now on, keep the networks of rewards on the CPU but while they are asked."""
        self._residence = Offload(entry.function for entry in self._entries)

    def close(self) -> None:
        """Let rewards that keep something open put it in order; they open it again when asked."""
        for entry in self._entries:
            entry.tell("close")

    def _others(self) -> list[tuple[int, Entry]]:
        """The rewards that are no people, with their places."""
        every = enumerate(self._entries)
        return [pair for pair in every if not getattr(pair[1].function, "asks_people", False)]

    def score(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[Prompt],
        groups: Sequence[int] | None = None,
    ) -> Scored:
        """Score images.

        Args:
            images: B of them.
            prompts: the prompt row of each, B.
            groups: the group of each, B, whole groups; None: they are in none.

        Raises:
            RewardFailure: a reward that may not skip groups has failed, or there are none.
        """
        return self._score(list(enumerate(self._entries)), images, prompts, groups)

    def _score(
        self,
        entries: Sequence[tuple[int, Entry]],
        images: Sequence[Image.Image],
        prompts: Sequence[Prompt],
        groups: Sequence[int] | None,
    ) -> Scored:
        with nullcontext() if self._residence is None else self._residence.home():
            return self._asked(entries, images, prompts, groups)

    def _asked(
        self,
        entries: Sequence[tuple[int, Entry]],
        images: Sequence[Image.Image],
        prompts: Sequence[Prompt],
        groups: Sequence[int] | None,
    ) -> Scored:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        texts = [prompt.text for prompt in prompts]
        columns = _columns_of(prompts)
        scored = Scored({}, routed(prompts, self.weights))
        for place, entry in entries:
            values = torch.full((len(images),), math.nan)
            asked = scored.weights[:, place].nonzero()[:, 0].tolist()
            whole = entry.function
            if groups is None:
                whole = getattr(whole, "alone", None if entry.group_wise else whole)
            if whole is None:
                raise RewardFailure(
                    f"reward {entry.name!r} compares the pictures of a group, and these are in "
                    "none: name others in eval.metrics"
                )

            def ask(rows: list[int], entry: Entry = entry, function: Any = whole) -> Tensor:
                mine = {key: [column[row] for row in rows] for key, column in columns.items()}
                few, said = [images[row] for row in rows], [texts[row] for row in rows]
                return entry.ask(function, few, said, mine)

            if groups is None:
                if asked:
                    values[asked] = ask(asked)
            else:
                asked = [row for row in asked if groups[row] not in scored.lost]
                _ask_groups(entry, ask, asked, groups, values, scored.lost)
            scored.by_name[entry.name] = values
        return scored


def _told(prompts: Sequence[Prompt], rows: Sequence[int]) -> list[Prompt]:
    """Some of the rows, which know their place among all: a reward counts those it is given."""
    return [replace(prompts[row], where=prompts[row].place(row)) for row in rows]


def _columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for prompt in prompts for key in prompt.metadata)
    keys.pop(COLUMN, None)
    return {key: [prompt.column(key) for prompt in prompts] for key in keys}


def _ask_groups(
    entry: Entry,
    ask: Callable[[list[int]], Tensor],
    rows: list[int],
    groups: Sequence[int],
    values: Tensor,
    lost: dict[int, str],
) -> None:
    """Ask about all rows at once, or group by group if that is how it works or it has failed."""
    by_group: dict[int, list[int]] = {}
    for row in rows:
        by_group.setdefault(groups[row], []).append(row)
    parts = list(by_group.values()) if entry.group_wise else [rows] * bool(rows)
    while parts:
        part = parts.pop(0)
        try:
            values[part] = ask(part)
        except RewardFailure as failure:
            if not failure.skips:
                raise
            inside = list(dict.fromkeys(groups[row] for row in part))
            if len(inside) == 1 or failure.gone:
                lost.update(dict.fromkeys(inside, str(failure)))
            else:
                parts += [by_group[group] for group in inside]
