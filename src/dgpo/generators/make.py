"""As many different rows as are wanted, in an order that the seed alone decides."""

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
"""Rows drawn for each one wanted, after which a generator is said to have no more."""


def _pocket(random: np.random.Generator) -> Iterator[Row]:
    """The captions of the small model's scenes that no test holds, shuffled, once each."""
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
    """Rows with ``count`` different prompts.

    Args:
        kind: ``geneval``, ``ocr`` or ``pocket``.
        count: how many.
        seed: equal seeds give equal rows, and the first rows of a longer list.
        without: prompts that must not be among them; upper case and spaces do not tell two apart.

    Raises:
        UserError: no such kind, or there are not so many.
    """
    if kind not in GENERATORS:
        raise UserError(
            f"no generator is called {kind!r}{nearest(kind, GENERATORS)}; "
            f"there are: {', '.join(GENERATORS)}"
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
    raise UserError(f"--n {count}: {kind} has but {len(found)} different prompts; ask for no more")


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def write_rows(out: Path, rows: Sequence[Row]) -> None:
    """Write rows: all of them as ``.jsonl``, the prompts alone as ``.txt``.

    Raises:
        UserError: another kind of file, one that is there already, or a ``.txt`` for rows whose
            metadata a reward needs.
    """
    suffix = out.suffix.lower()
    if suffix not in (".jsonl", ".txt"):
        raise UserError(f"--out {out}: should end with .jsonl, or with .txt for the prompts alone")
    if suffix == ".txt" and "include" in rows[0]:
        raise UserError(f"--out {out}: a .txt would lose what the reward looks for; use .jsonl")
    dumped = (json.dumps(row, ensure_ascii=False) for row in rows)
    lines = dumped if suffix == ".jsonl" else (row["prompt"] for row in rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with out.open("x", encoding="utf-8", newline="\n") as stream:
            stream.writelines(f"{line}\n" for line in lines)
    except FileExistsError:
        raise UserError(f"--out {out} is there already; it is left as it is") from None
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error
