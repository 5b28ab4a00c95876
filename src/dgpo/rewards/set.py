"""A weighted set of rewards, whose answers are checked before they are believed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dgpo.errors import UserError
from dgpo.media import Lost
from dgpo.prompts import Prompt
from dgpo.prompts.prompts import columns_of
from dgpo.rewards.entry import Entry, entry_of
from dgpo.rewards.mixing import COLUMN, routed
from dgpo.rewards.offload import Offload
from dgpo.rewards.reward import RewardFailure, RewardFunction
from dgpo.user_code import disturbs, user_code


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
    """The weight of each reward for each row, float64 [B, K]; 0 where it was not asked."""
    lost: dict[int, str] = field(default_factory=dict)
    """The groups that a reward has failed, or of which an image is lost, and why."""


def load_rewards(
    spec: Mapping[Any, Any] | Sequence[str | RewardFunction] | str | RewardFunction,
) -> RewardSet:
    """Look rewards up and import them.

    >>> load_rewards({"redness": 1.0, "smooth": {"use": "jpeg_compressibility"}}).weights
    {'redness': 1.0, 'smooth': 1.0}
    >>> load_rewards(lambda images, prompts: [0.5] * len(images)).names
    ['<lambda>']

    Args:
        spec: ``{name: weight}`` or ``{name: RewardSettings}`` as in a recipe, or one or
            several names, functions or :class:`Reward` objects (weight 1).

    Raises:
        UserError: no reward, an unknown name, a weight of 0, the same name twice, or something
            that cannot be called as a reward.
    """
    if isinstance(spec, Mapping):
        pairs: list[tuple[Any, Any]] = list(spec.items())
    else:
        several = [spec] if isinstance(spec, str) or callable(spec) else spec
        pairs = [(one, 1.0) for one in several]
    if not pairs:
        raise UserError("rewards: none given; for example rewards: {pocket_geneval: 1.0}")
    return RewardSet([entry_of(given, how) for given, how in pairs])


class RewardSet:
    """Several rewards and their weights, called as one.

    >>> rewards = load_rewards({"redness": 2.0, "brightness": 1.0})
    >>> red = Image.new("RGB", (8, 8), "red")
    >>> by_name, total = rewards([red], [Prompt("a red wall")])
    >>> by_name["redness"], total
    (tensor([1.]), tensor([2.3333]))
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = tuple(entries)
        self._offload: Offload | None = None
        names = self.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"rewards: {', '.join(twice)} given twice; give each its own name")

    @property
    def names(self) -> list[str]:
        """The names of the rewards, in order."""
        return [entry.name for entry in self._entries]

    def names_with(self, fact: Literal["group_wise", "asks_people"]) -> list[str]:
        """The names of the rewards that compare the pictures of a group, or that are people."""
        return [entry.name for entry in self._entries if getattr(entry.reward, fact)]

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each reward."""
        return {entry.name: entry.settings.weight for entry in self._entries}

    @property
    def disturbs(self) -> bool:
        """Return whether a reward has changed what the whole process shares, so that it must not be
        asked while something else computes."""
        return any(disturbs(f"reward {name!r}") for name in self.names)

    @property
    def sources(self) -> dict[str, str]:
        """The SHA-256 of the file of each reward that is the user's own, by its name."""
        return {entry.name: entry.source for entry in self._entries if entry.source}

    @property
    def media(self) -> str:
        """What the rewards score: ``pictures``, ``videos`` or ``sounds``.

        Raises:
            UserError: not all score the same.
        """
        found = set()
        for entry in self._entries:
            with user_code(f"reward {entry.name!r}"):
                found.add(entry.reward.media)
        if len(found) != 1:
            raise UserError(f"rewards of {' and '.join(sorted(found))} cannot be asked together")
        return found.pop()

    def load(self) -> None:
        """Let every reward load its model and miss what it lacks, while there are no prompts yet:
        its ``check`` is asked about none.

        Raises:
            UserError: the reason that the reward gives.
        """
        for entry in self._entries:
            entry.check([])

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Let every reward refuse prompts that it cannot score, before the run starts.

        Raises:
            UserError: the reason that the reward gives, or a row names rewards that are not there.
        """
        for entry, rows in self._asked(prompts, routed(prompts, self.weights)):
            if rows:
                entry.check(prompts if len(rows) == len(prompts) else _told(prompts, rows))

    def run_in(self, folder: Path) -> None:
        """Tell the rewards where the run's folder is."""
        for entry in self._entries:
            entry.tell("run_in", folder)

    def offload(self) -> None:
        """Keep the networks of rewards on the CPU from now on, except while they are asked."""
        self._offload = Offload(entry.reward for entry in self._entries)

    def close(self) -> None:
        """Let rewards put in order what they have open; they open it again when asked."""
        for entry in self._entries:
            entry.tell("close")

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
        lost = self.score(images, prompts, [0] * len(images), people=False).lost
        if lost:
            raise RewardFailure(lost[0])

    def announce(
        self, images: Sequence[Image.Image], prompts: Sequence[Prompt], groups: Sequence[int]
    ) -> None:
        """Let rewards that take their time see whole groups before they are asked about them.

        Args:
            images, prompts, groups: see :meth:`score`.

        Raises:
            UserError: the reason that the reward gives.
        """
        every = _Rows(images, prompts)
        lost = every.lost(groups)
        for entry, rows in self._asked(prompts, routed(prompts, self.weights)):
            for group, part in _by_group(rows, groups).items():
                if group in lost:
                    continue
                media, texts, columns = entry.given(*every.part(part), all_columns=True)
                entry.tell("announce", media, texts, **columns)

    def score(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[Prompt],
        groups: Sequence[int] | None = None,
        people: bool = True,
    ) -> Scored:
        """Score images.

        Args:
            images: B of them; no reward sees one that is lost, or others of its group.
            prompts: the prompt row of each, B.
            groups: the group of each, B, whole groups; None: they are in none.
            people: whether rewards that are people are asked as well.

        Raises:
            RewardFailure: a reward that may not skip groups has failed, or there are none.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        every = _Rows(images, prompts)
        scored = Scored({}, routed(prompts, self.weights), every.lost(groups or ()))
        home: AbstractContextManager = self._offload.home() if self._offload else nullcontext()
        with home:
            for entry, rows in self._asked(prompts, scored.weights):
                if people or not entry.reward.asks_people:
                    scored.by_name[entry.name] = _values(entry, every, rows, groups, scored.lost)
        return scored

    def _asked(self, prompts: Sequence[Prompt], weights: Tensor) -> list[tuple[Entry, list[int]]]:
        """Each reward and the rows that ask it."""
        columns = enumerate(self._entries)
        return [(one, weights[:, k].nonzero()[:, 0].tolist()) for k, one in columns]


def _told(prompts: Sequence[Prompt], rows: Sequence[int]) -> list[Prompt]:
    """Return some of the rows, which know their place among all: a reward counts those it gets."""
    return [replace(prompts[row], where=prompts[row].place(row)) for row in rows]


class _Rows:
    """Images and what their prompt rows say."""

    def __init__(self, images: Sequence[Any], prompts: Sequence[Prompt]) -> None:
        self._images, self._texts = images, [prompt.text for prompt in prompts]
        self._columns = columns_of(prompts)
        self._columns.pop(COLUMN, None)

    def __len__(self) -> int:
        return len(self._texts)

    def lost(self, groups: Sequence[int]) -> dict[int, str]:
        """The groups, if there are any, in which an image is lost, and why."""
        pairs = zip(groups, self._images, strict=False)
        return {group: image.why for group, image in pairs if isinstance(image, Lost)}

    def there(self, rows: Sequence[int]) -> list[int]:
        """Return those of the rows whose image is not lost."""
        return [row for row in rows if not isinstance(self._images[row], Lost)]

    def part(self, rows: Sequence[int]) -> tuple[list[Any], list[str], dict[str, list[Any]]]:
        """Some of the rows, as rewards are given them."""
        columns = {key: [column[row] for row in rows] for key, column in self._columns.items()}
        return [self._images[row] for row in rows], [self._texts[row] for row in rows], columns


def _by_group(rows: Sequence[int], groups: Sequence[int]) -> dict[int, list[int]]:
    by_group: dict[int, list[int]] = {}
    for row in rows:
        by_group.setdefault(groups[row], []).append(row)
    return by_group


def _values(
    entry: Entry,
    every: _Rows,
    rows: list[int],
    groups: Sequence[int] | None,
    lost: dict[int, str],
) -> Tensor:
    """The numbers of one reward for all rows, NaN for those that it is not asked about.

    It is asked about all rows at once, or group by group if that is how it works or it has failed.

    Args:
        entry, every, rows: the reward, all rows, and those that ask it.
        groups: see :meth:`RewardSet.score`.
        lost: groups that are not asked about any more; those that fail now are added.
    """
    values = torch.full((len(every),), math.nan)
    if groups is None:
        if rows := every.there(rows):
            values[rows] = entry.ask(*every.part(rows), grouped=False)
        return values
    rows = [row for row in rows if groups[row] not in lost]
    parts = (
        list(_by_group(rows, groups).values()) if entry.reward.group_wise else [rows] * bool(rows)
    )
    while parts:
        part = parts.pop(0)
        inside = _by_group(part, groups)
        try:
            values[part] = entry.ask(*every.part(part), grouped=True)
        except RewardFailure as failure:
            if not failure.skips:
                raise
            if len(inside) == 1 or failure.gone:
                lost.update(dict.fromkeys(inside, str(failure)))
            else:
                parts += inside.values()
    return values
