"""The library ``datasets`` reads prompts from a set of the hub or from your own files and folders.

In ``datasets:NAME?split=...&column=...&config=...&revision=...`` NAME is ``owner/name`` on the hub,
a folder (with files in it, or written by ``save_to_disk``), or a file (.parquet, .csv, .json,
.jsonl, .arrow).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from dgpo.errors import MissingExtra, UserError
from dgpo.registry import nearest

PREFIX = "datasets:"
OPTIONS = ("split", "column", "config", "revision")
"""The options after the name: ``split`` (default train), ``column`` with the prompts (default
prompt), ``config`` (the table, if a set has several) and ``revision`` (a commit or tag)."""
_KINDS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".arrow": "arrow",
}


def dataset_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the rows of ``datasets:...``, each with its place.

    The library refuses a set that wants to run code of its own, and nothing here allows it.

    Raises:
        UserError: an option is unknown, or the library cannot read the set.
    """
    name, options = _parsed(source)
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "datasets") from error
    try:
        table = _load(datasets, name, options)
    except Exception as error:  # the library raises a dozen kinds; all mean that it cannot be read
        first = (str(error) or type(error).__name__).partition("\n")[0]
        raise UserError(f"prompts {source}: {first:.300}") from error
    column = options.get("column", "prompt")
    if column not in table.column_names:
        hint = nearest(column, table.column_names)
        raise UserError(
            f"prompts {source}: no column {column!r}{hint}; name the one with the prompts: "
            f"column={' | '.join(table.column_names)}"
        )
    return _rows(table, column, source)


def _parsed(source: str) -> tuple[str, dict[str, str]]:
    name, _, query = source.removeprefix(PREFIX).partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    wrong = [key for key in options if key not in OPTIONS]
    if not name or wrong or len(options) != len(pairs) or not all(options.values()):
        what = f"unknown option {wrong[0]!r}{nearest(wrong[0], OPTIONS)}" if wrong else "not a set"
        raise UserError(
            f"prompts {source!r:.200}: {what}; write {PREFIX}owner/name or {PREFIX}FOLDER, and "
            f"after a ? any of {', '.join(OPTIONS)}, such as ?split=train&column=caption"
        )
    return name, options


def _load(datasets: Any, name: str, options: dict[str, str]) -> Any:
    split, place = options.get("split", "train"), Path(name).expanduser()
    if (place / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(place / split))
    if (place / "dataset_info.json").is_file() and (place / "state.json").is_file():
        return datasets.load_from_disk(str(place))
    if place.is_file():
        kind = _KINDS.get(place.suffix.lower())
        if kind is None:
            raise ValueError(f"{place.suffix or 'no suffix'} is none of {', '.join(_KINDS)}")
        return datasets.load_dataset(kind, data_files={split: str(place)}, split=split)
    named = str(place) if place.is_dir() else name
    revision = options.get("revision")
    return datasets.load_dataset(named, options.get("config"), split=split, revision=revision)


def _rows(table: Iterable[Any], column: str, source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, row in enumerate(table):
        rest = {key: value for key, value in row.items() if key not in (column, "prompt")}
        yield f"{source}, row {index}", {"prompt": row[column], **without_gaps(rest)}


def without_gaps(value: Any) -> Any:
    """Return a row without the cells that a table has filled with None, also inside lists."""
    if isinstance(value, dict):
        return {key: without_gaps(own) for key, own in value.items() if own is not None}
    return [without_gaps(one) for one in value] if isinstance(value, list) else value
