"""Scores the pictures that are there while the next ones are sampled, or the policy is trained."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from time import monotonic
from typing import Any, TypeAlias

import torch
from PIL import Image

from dgpo.prompts import Prompt
from dgpo.rewards.call_limits import in_thread
from dgpo.rewards.set import RewardSet, Scored

_Task: TypeAlias = tuple[list[Image.Image], list[Prompt], list[int]]
"""Pictures, the prompt row of each, and its group."""


class Scoring:
    """Scores whole groups, or what this process has of them, as soon as the pictures are there.

    With ``overlap`` one thread asks the rewards, in order, while the caller goes on; without, they
    are asked in :meth:`finish`. The calls are the same, and so are their answers.

    Args:
        rewards: the rewards to ask.
        prompts: the prompt of each group.
        size: how many pictures a group has.
        overlap: whether to ask in a thread; rewards that disturb the process are not.
        groups: the group of each picture that will come, ascending; None for all pictures of all
            groups.
        after: what is scored before. Rewards are asked by one at a time, in order.
    """

    def __init__(
        self,
        rewards: RewardSet,
        prompts: Sequence[Prompt],
        size: int,
        overlap: bool,
        groups: Sequence[int] | None = None,
        after: Scoring | None = None,
    ) -> None:
        self._rewards, self._prompts = rewards, list(prompts)
        every = [group for group in range(len(self._prompts)) for _ in range(size)]
        self._groups = every if groups is None else list(groups)
        self._waiting: list[Image.Image] = []
        self._given = 0
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._parts: list[Scored] = []
        self._ended = False
        self._before = None if after is None else after.done
        self.done: Future[None] = Future()
        """Done once no reward will be asked any more."""
        self.seconds = 0.0
        """The seconds that rewards have taken."""
        self._work: Future[None] | None = None
        if overlap and not rewards.disturbs:
            with beside_the_others():
                self._work = in_thread(self._run)

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Ask no reward any more: what waits is left."""
        self._ended = True
        self._tasks.put(None)
        if self._work is None and not self.done.done():
            self.done.set_result(None)

    def add(self, images: Sequence[Image.Image], go_on: bool = False) -> None:
        """Take the next pictures, group after group.

        Args:
            images: the pictures.
            go_on: take them, too, if a reward has failed for earlier ones: they shall be kept.

        Raises:
            UserError: a reward has failed for earlier pictures, so sampling on is no use.
        """
        if self._work is not None and self._work.done() and not go_on:
            self._work.result()
        self._waiting += images
        first, end = self._given, self._given + len(self._waiting)
        # the last group may still lack pictures: rewards are asked about whole groups alone
        while 0 < end < len(self._groups) and self._groups[end - 1] == self._groups[end]:
            end -= 1
        count = end - first
        if count > 0:
            groups = self._groups[first:end]
            task = (self._waiting[:count], [self._prompts[group] for group in groups], groups)
            self._rewards.announce(*task)
            self._tasks.put(task)
            self._waiting = self._waiting[count:]
            self._given = end

    def finish(self) -> Scored:
        """Wait for the scores of all pictures, in order.

        Raises:
            UserError: a reward has failed.
        """
        assert self._given == len(self._groups) and not self._waiting, "pictures are missing"
        self._tasks.put(None)
        if self._work is None:
            self._run()
        else:
            self._work.result()
        parts = self._parts
        names = self._rewards.names
        return Scored(
            {name: torch.cat([part.by_name[name] for part in parts]) for name in names},
            torch.cat([part.weights for part in parts]),
            {group: why for part in parts for group, why in part.lost.items()},
        )

    def _run(self) -> None:
        try:
            if self._before is not None:
                wait([self._before])
                self._before = None
            while (task := self._tasks.get()) is not None and not self._ended:
                began = monotonic()
                self._parts.append(self._rewards.score(*task))
                self.seconds += monotonic() - began
        finally:
            if not self.done.done():
                self.done.set_result(None)


def beside_the_others() -> AbstractContextManager[Any]:
    """Have the GPU, if there is one, compute what is asked inside the block beside other work, once
    all is done that was asked before."""
    if not torch.cuda.is_initialized():
        return nullcontext()
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The one stream of rewards: memory that was used on a stream is kept for it."""
    return torch.cuda.Stream(device)
