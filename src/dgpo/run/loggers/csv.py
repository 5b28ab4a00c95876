"""Tables for spreadsheets and pandas: ``train.csv`` and ``eval.csv`` in the run's folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from dgpo.disk import replace_text
from dgpo.run.loggers.base import LoggedRun, Logger


class CsvLogger(Logger):
    """Writes a row for every iteration into ``train.csv`` and for every evaluation into
    ``eval.csv``; a figure that comes up later adds a column."""

    def begin(self, run: LoggedRun) -> None:
        self._files = {kind: _Table(run.folder / f"{kind}.csv") for kind in ("train", "eval")}
        if run.resumed_after is not None:
            for table in self._files.values():
                table.drop_after(run.resumed_after)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        kind = next(iter(values)).partition("/")[0]
        row = {tag.removeprefix(f"{kind}/"): repr(value) for tag, value in values.items()}
        self._files[kind].add({"iteration": str(step), **row})


class _Table:
    """A file of comma-separated values whose header may grow."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._columns: list[str] = []

    def drop_after(self, iteration: int) -> None:
        """Keep the rows up to an iteration."""
        rows = [row for row in self._rows() if int(row["iteration"]) <= iteration]
        self._columns = list(rows[0]) if rows else []
        self._replace(rows)

    def add(self, row: Mapping[str, str]) -> None:
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._replace([*self._rows(), row])
            return
        with self._file.open("a", encoding="utf-8", newline="") as stream:
            self._writer(stream).writerow(row)

    def _rows(self) -> list[dict[str, str]]:
        if not self._file.exists():
            return []
        whole = self._file.read_text(encoding="utf-8").rpartition("\n")[0]  # a kill may cut a line
        return list(csv.DictReader(whole.splitlines()))

    def _replace(self, rows: Iterable[Mapping[str, str]]) -> None:
        text = io.StringIO()
        self._writer(text).writeheader()
        self._writer(text).writerows(rows)
        replace_text(self._file, text.getvalue())

    def _writer(self, stream: io.TextIOBase) -> csv.DictWriter[str]:
        return csv.DictWriter(stream, self._columns, lineterminator="\n")
