"""Prompt rows are drawn until there are enough different ones; the seed alone decides which."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgpo.errors import UserError
from dgpo.generators import geneval, ocr
from dgpo.registry import nearest

Row = dict[str, Any]
TRIES = 20
"""How many rows are drawn for each wanted one before a generator counts as exhausted."""


def _pocket(random: np.random.Generator) -> Iterator[Row]:
    """Yield the captions of the pocket's scenes that are not held out, shuffled, once each."""
    from dgpo.pocket.prompts import train_prompts

    every = train_prompts()
    for place in random.permutation(len(every)).tolist():
        yield every[place]


GENERATORS: dict[str, Callable[[np.random.Generator], Iterator[Row]]] = {
    "geneval": geneval.rows,
    "ocr": ocr.rows,
    "pocket": _pocket,
}


def make_rows(kind: str, count: int, seed: int, without: Collection[str] = ()) -> list[Row]:
    """Make rows with ``count`` different prompts.

    Args:
        kind: ``geneval``, ``ocr`` or ``pocket``.
        count: how many rows to make.
        seed: equal seeds give equal rows; a smaller ``count`` gives the first of them.
        without: prompts to leave out; upper case and extra spaces make no difference.

    Raises:
        UserError: the kind is unknown, or it has too few prompts.

    >>> rows = make_rows("geneval", count=6, seed=0)
    >>> [row["tag"] for row in rows]
    ['single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr']
    >>> rows == make_rows("geneval", count=100, seed=0)[:6]
    True
    """
    if kind not in GENERATORS:
        raise UserError(
            f"unknown generator {kind!r}{nearest(kind, GENERATORS)}; "
            f"there are {', '.join(GENERATORS)}"
        )
    found: list[Row] = []
    seen = {_plain(text) for text in without}
    drawn = GENERATORS[kind](np.random.Generator(np.random.PCG64(seed)))
    for row in itertools.islice(drawn, TRIES * (count + len(seen) + 100)):
        if (name := _plain(row["prompt"])) not in seen:
            seen.add(name)
            found.append(row)
            if len(found) == count:
                return found
    raise UserError(f"--n {count}: {kind} has only {len(found)} different prompts; ask for fewer")


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def write_rows(out: Path, rows: Sequence[Row]) -> None:
    """Write whole rows as ``.jsonl``, or the prompts alone as ``.txt``.

    Raises:
        UserError: the file has another suffix or exists already, or it is a ``.txt`` and a reward
            needs the metadata of the rows.
    """
    suffix = out.suffix.lower()
    if suffix not in (".jsonl", ".txt"):
        raise UserError(f"--out {out}: should end with .jsonl, or with .txt for the prompts alone")
    if suffix == ".txt" and "include" in rows[0]:
        raise UserError(f"--out {out}: a .txt would lose what the reward needs; use .jsonl")
    dumped = (json.dumps(row, ensure_ascii=False) for row in rows)
    lines = dumped if suffix == ".jsonl" else (row["prompt"] for row in rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with out.open("x", encoding="utf-8", newline="\n") as stream:
            stream.writelines(f"{line}\n" for line in lines)
    except FileExistsError:
        raise UserError(f"--out {out} is there already; give another name or move it") from None
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error
