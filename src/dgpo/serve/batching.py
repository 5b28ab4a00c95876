"""A thread for each reward, which scores together what several requests ask at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, Full, Queue
from threading import Thread
from time import monotonic
from typing import Any

from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.rewards import RewardSet


class Busy(Exception):
    """Too many pictures wait already."""


class Refused(Exception):
    """The rows cannot be scored by this reward; the message says why."""


class Failed(Exception):
    """The reward has failed."""


@dataclass(frozen=True)
class _Job:
    images: Sequence[Any]
    rows: Sequence[Prompt]
    answer: Future[list[float]] = field(default_factory=Future)


class Batcher:
    """Scores pictures with one reward, one call at a time.

    Args:
        rewards: a set with that one reward.
        batch: the most pictures or videos of a call, unless a single request has more.
        linger: seconds that a request may wait for others to come.
        waiting: how many requests may wait.
    """

    def __init__(
        self, rewards: RewardSet, batch: int = 64, linger: float = 0.005, waiting: int = 256
    ) -> None:
        self._rewards, self._batch, self._linger = rewards, batch, linger
        (self.name,) = rewards.names
        self._jobs: Queue[_Job] = Queue(waiting)
        Thread(target=self._run, daemon=True, name=f"reward-{self.name}").start()

    def submit(self, images: Sequence[Any], rows: Sequence[Prompt]) -> Future[list[float]]:
        """Ask for scores; the future may raise :class:`Refused` or :class:`Failed`.

        Args:
            images: B pictures, or B videos as lists of pictures.
            rows: the prompt row of each.

        Raises:
            Busy: too many requests wait.
        """
        job = _Job(images, rows)
        try:
            self._jobs.put_nowait(job)
        except Full:
            raise Busy from None
        return job.answer

    def _run(self) -> None:
        held: _Job | None = None
        while True:
            jobs, held = self._together(held or self._jobs.get())
            # from now on nobody can withdraw them; those withdrawn already are not scored
            wanted = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            if wanted:
                self._score(wanted)

    def _together(self, first: _Job) -> tuple[list[_Job], _Job | None]:
        """Collect jobs for one call; the second part is a job that did not fit."""
        jobs, count, until = [first], len(first.images), monotonic() + self._linger
        while count < self._batch:
            try:
                job = self._jobs.get(timeout=max(0.0, until - monotonic()))
            except Empty:
                break
            if count + len(job.images) > self._batch:
                return jobs, job
            jobs.append(job)
            count += len(job.images)
        return jobs, None

    def _score(self, jobs: list[_Job]) -> None:
        images = [image for job in jobs for image in job.images]
        rows = [row for job in jobs for row in job.rows]
        try:
            numbers = self._rewards(images, rows).by_name[self.name].tolist()
        except Exception as error:  # a reward may raise anything; each request is told its own
            if len(jobs) == 1:
                jobs[0].answer.set_exception(self._blame(jobs[0], error))
                return
            for job in jobs:
                self._score([job])
            return
        for job in jobs:
            job.answer.set_result(numbers[: len(job.images)])
            numbers = numbers[len(job.images) :]

    def _blame(self, job: _Job, error: Exception) -> Exception:
        """The refusal of the rows if they are at fault, else the failure of the reward."""
        try:
            self._rewards.check(job.rows)
        except UserError as refusal:
            return Refused(str(refusal))
        except Exception:  # it chokes on the rows before it has looked at a picture
            return Refused(f"reward {self.name!r} cannot read these prompts or their metadata")
        return Failed(str(error) or type(error).__name__)
