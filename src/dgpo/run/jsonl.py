"""Files with one JSON object a line, which a killed process leaves readable."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgpo.disk import append_line, replace_text
from dgpo.errors import UserError


def read_jsonl(file: str | Path) -> list[dict[str, Any]]:
    """Read the objects of a ``.jsonl`` file; a missing file has none.

    A last line that a crash cut short is left out.

    >>> from tempfile import mkdtemp
    >>> file = Path(mkdtemp(), "metrics.jsonl")
    >>> _ = file.write_text('{"iteration": 1, "loss": 0.5}\\n{"iter')
    >>> read_jsonl(file)
    [{'iteration': 1, 'loss': 0.5}]

    Raises:
        UserError: another line is no JSON object; the message names the line.
    """
    return _read(Path(file))[0]


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Write a row at the end of a file; a checkpoint must not outlive the rows before it."""
    append_line(file, _line(row))


def keep_rows(file: Path, needed: Sequence[str], last: int) -> list[str]:
    """Drop the rows after an iteration, and a last line that was cut short.

    Args:
        file: the file; a missing one stays missing.
        needed: the keys that every row has; ``iteration`` is one of them.
        last: the last iteration whose rows stay.

    Returns:
        What was lost of the iterations before, in words.

    Raises:
        UserError: a row is damaged; the file is left as it is.
    """
    if not file.exists():
        return []
    rows, cut = _read(file)
    for number, row in enumerate(rows, start=1):
        missing = [key for key in needed if key not in row]
        if missing or type(row["iteration"]) is not int:
            what = f"without {', '.join(missing)}" if missing else f"{row['iteration']!r:.40}"
            raise UserError(
                f"{file}: row {number} is no row of a run (iteration: {what}); put it right or "
                "delete it, and try again"
            )
    replace_text(file, "".join(f"{_line(row)}\n" for row in rows if row["iteration"] <= last))
    shown = cut[:60].decode("utf-8", "replace")
    return [f"{file}: the last line was cut short and is left out: {shown}..."] if cut else []


def missing_rows(file: Path, last: int) -> list[str]:
    """Name the iterations up to ``last`` that have no row, in words."""
    there = {row["iteration"] for row in read_jsonl(file)}
    missing = [iteration for iteration in range(1, last + 1) if iteration not in there]
    if not missing:
        return []
    shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
    return [f"{file} has no row of {len(missing)} earlier iterations: {shown}"]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


def _read(file: Path) -> tuple[list[dict[str, Any]], bytes]:
    """Read the objects of a file, and the last line if it was cut short: it has no newline."""
    # only at newlines: str.splitlines would also cut at U+2028 inside a text
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return rows, line
            raise _broken(file, number, f"not JSON ({error})") from error
        if not isinstance(row, dict):
            raise _broken(file, number, f"{row!r:.40} is no object")
        rows.append(row)
    return rows, b""


def _broken(file: Path, number: int, why: str) -> UserError:
    return UserError(
        f"{file}, line {number}: {why}; put this line right or delete it (it holds what was "
        "measured, on which no weight depends), and try again"
    )
