"""JSON lines: all figures in ``scalars.jsonl`` of the run's folder."""

from __future__ import annotations

from collections.abc import Mapping

from dgpo.run.jsonl import append_row, keep_rows
from dgpo.run.loggers.base import LoggedRun, Logger


class JsonlLogger(Logger):
    """Writes one flat object for every iteration and every evaluation: ``{"iteration": 3,
    "train/loss": 0.1, ...}``."""

    def begin(self, run: LoggedRun) -> None:
        self._file = run.folder / "scalars.jsonl"
        if run.resumed_after is not None:
            keep_rows(self._file, ("iteration",), run.resumed_after)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        append_row(self._file, {"iteration": step, **values})
