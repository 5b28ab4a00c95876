"""What a logger is told of a run, and when."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from dgpo.disk import DAMAGED, replace_text
from dgpo.errors import UserError


@dataclass(frozen=True)
class LoggedRun:
    """The run that a logger writes about.

    Args:
        name: ``run.name``, or the name of the run's folder.
        folder: the run's folder; a logger may write files of its own there.
        config: the recipe as nested plain data.
        resumed_after: the iteration after which the run goes on, -1 if it begins again, None if it
            is new. Whatever was logged of later iterations will be logged once more.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    resumed_after: int | None = None

    @cached_property
    def id(self) -> str:
        """The run's identity for trackers: 8 hexadecimal digits, the same after every resume.

        It is made when a logger first asks for it, and kept in ``loggers.json``.

        Raises:
            UserError: the file is damaged.
        """
        file = self.folder / "loggers.json"
        if self.resumed_after is not None and file.exists():
            try:
                return str(json.loads(file.read_text(encoding="utf-8"))["id"])
            except DAMAGED as error:
                raise UserError(
                    f"{file} is damaged ({error}); delete it, and the trackers begin a new run"
                ) from error
        made = uuid.uuid4().hex[:8]
        replace_text(file, json.dumps({"id": made}) + "\n")
        return made


class Logger:
    """A base class for loggers: override the hooks that you need, and name your class in
    ``run.loggers`` as ``package.module:Class`` or ``path/to/file.py:Class``.

    The options of its entry in the recipe are the arguments of its constructor, which should fail
    if something is missing. A hook that raises is told once, and the run goes on without the
    logger; only :meth:`begin` of a new run ends the run, before anything is trained. Only the main
    process has loggers.

    >>> class Best(Logger):
    ...     def begin(self, run):
    ...         self.best = float("-inf")
    ...     def scalars(self, values, step):
    ...         self.best = max(self.best, values.get("eval/overall", self.best))
    >>> logger = Best()
    >>> logger.begin(LoggedRun("mine", Path("runs/mine"), {}))
    >>> logger.scalars({"eval/overall": 0.5}, step=0)
    >>> logger.best
    0.5
    """

    def begin(self, run: LoggedRun) -> None:
        """Open the log of a run, new or resumed."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log figures.

        Args:
            values: by tag: ``train/...`` of an iteration, or ``eval/...`` of an evaluation.
            step: iterations done; 0 is the base model.
        """

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Log a grid of pictures.

        Args:
            name: ``samples/grid`` (fixed prompts and seeds over training) or
                ``samples/before_after`` (at the end).
            image: the grid, with its captions.
            step: iterations done.
        """

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """Log a table.

        Args:
            name: ``rollouts``: some prompts of an iteration, with the rewards of their pictures.
            columns: the names of the columns.
            rows: texts and numbers, one for each column.
            step: the iteration.
        """

    def end(self, failed: bool) -> None:
        """Close the log.

        Args:
            failed: an error ends the run. Ctrl-C and SIGTERM are none: the run can go on.
        """
