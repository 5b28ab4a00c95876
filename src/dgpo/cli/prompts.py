"""The command `dgpo prompts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from dgpo.cli.checks import check_file

_WITHOUT = "Prompts to leave out."


def prompts(
    kind: Annotated[str, Argument(metavar="geneval|ocr|pocket", help="What they ask for.")],
    out: Annotated[Path, Option(metavar="FILE", help=".jsonl, or .txt for the prompts alone.")],
    n: Annotated[int, Option(min=1, metavar="N", help="Prompts to write.")] = 1000,
    seed: Annotated[int, Option(min=0, metavar="S", help="Seed of the choice.")] = 0,
    without: Annotated[list[str] | None, Option(metavar="FILE", help=_WITHOUT)] = None,
) -> None:
    """Write distinct prompts, with what a reward needs to know about each."""
    from dgpo.prompts import load_prompts

    check_file("--out", out)
    left_out = [prompt.text for source in without or [] for prompt in load_prompts(source)]
    from dgpo.generators import make_rows, write_rows

    write_rows(out, make_rows(kind, n, seed, left_out))
    print(f"{n} prompts in {out}")
