"""The command `dgpo score`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from dgpo.cli.checks import check_file, check_rewards
from dgpo.cli.common import new_table
from dgpo.cli.options import Rewards
from dgpo.errors import UserError

if TYPE_CHECKING:
    from dgpo.prompts import Prompt

SHOWN = 20
"""Pictures in the printed table; the file of --json has all."""
_PROMPTS = ".txt or .jsonl: one row for all, or a row for each picture, 2.png before 10.png."
_JSON_FILE = "A .jsonl to write, a line a picture."


def score(
    reward: Rewards,
    images: Annotated[Path, Option(metavar="DIR|FILE", help="A folder of pictures, or one.")],
    prompts: Annotated[str, Option(metavar="FILE", help=_PROMPTS)],
    json_file: Annotated[Path | None, Option("--json", metavar="OUT", help=_JSON_FILE)] = None,
    batch: Annotated[int, Option(min=1, metavar="N", help="Pictures read at once.")] = 64,
) -> None:
    """Score pictures that exist already, such as those of `dgpo sample`."""
    from dgpo.prompts import load_prompts

    files = picture_files(images)
    check_file("--json", json_file)
    rows = _row_each(load_prompts(prompts), files)
    check_rewards(reward)
    from dgpo.pictures import open_picture
    from dgpo.rewards import load_rewards

    rewards = load_rewards(reward)
    rewards.check(rows)
    scores: dict[str, list[float]] = {name: [] for name in rewards.names}
    for start in range(0, len(files), batch):
        opened = [open_picture(file, f"--images {file}") for file in files[start : start + batch]]
        by_name = rewards(opened, rows[start : start + batch]).by_name
        for name, values in by_name.items():
            scores[name] += values.tolist()
    if json_file is not None:  # before anything is printed, which may fail
        _write(json_file, files, rows, scores)
    _print(files, rows, scores)
    if json_file is not None:
        print(f"written to {json_file}")


def picture_files(place: Path) -> list[Path]:
    """Return the pictures of a folder in natural order, or the one picture given.

    Raises:
        UserError: there is no picture.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UserError(f"--images {place}: there is no such folder or file")
    from dgpo.pictures import SUFFIXES, pictures_in

    files = pictures_in(place)
    if not files:
        raise UserError(f"--images {place}: there is no picture in it ({', '.join(SUFFIXES)})")
    return files


def _row_each(rows: list[Prompt], files: list[Path]) -> list[Prompt]:
    if len(rows) == 1:
        return rows * len(files)
    if len(rows) != len(files):
        raise UserError(
            f"{len(files)} pictures and {len(rows)} prompts: give a row for each picture, from "
            f"{files[0].name} to {files[-1].name}, or one row for all"
        )
    return rows


def _print(files: Sequence[Path], rows: Sequence[Prompt], scores: dict[str, list[float]]) -> None:
    import statistics

    from rich.text import Text

    console, table = new_table()
    table.add_column("picture", no_wrap=True)
    for name in scores:
        table.add_column(name, justify="right")
    table.add_column("prompt", overflow="ellipsis", no_wrap=True)
    for place, (file, row) in enumerate(zip(files[:SHOWN], rows, strict=False)):
        numbers = (f"{values[place]:.4f}" for values in scores.values())
        table.add_row(Text(file.name), *numbers, Text(row.text))
    if len(files) > SHOWN:
        table.add_row(f"... {len(files) - SHOWN} more")
    table.add_section()
    table.add_row("mean", *(f"{statistics.fmean(values):.4f}" for values in scores.values()))
    if len(files) > 1:
        table.add_row("std", *(f"{statistics.stdev(values):.4f}" for values in scores.values()))
    console.print(table)


def _write(
    out: Path, files: Sequence[Path], rows: Sequence[Prompt], scores: dict[str, list[float]]
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    # the name of a file may hold bytes that are no text: JSON writes them as escapes
    with out.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        for place, (file, row) in enumerate(zip(files, rows, strict=True)):
            values = {name: column[place] for name, column in scores.items()}
            line = {"image": str(file), "prompt": row.text, "scores": values}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
