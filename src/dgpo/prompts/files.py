"""Prompt files are read row by row (``.txt``, ``.jsonl``), each with the place for errors."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dgpo.errors import UserError
from dgpo.registry import PROMPTS, nearest

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, which it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
Row = tuple[str, dict[str, Any]]
"""Holds where a row stands (the file and the line) and what it says."""


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a prompt file as ``{"prompt": ..., ...}``, without blank lines.

    Raises:
        UserError: there is no such file, its kind is unknown, or a line cannot be read.
    """
    if not os.path.isfile(path):  # unlike Path, it knows no name that raises
        hint = nearest(str(path), PROMPTS)
        what = "this is a folder" if os.path.isdir(path) else "the file does not exist"
        raise UserError(
            f"prompts {str(path)!r:.200}: {what}{hint}; built-in sets: {', '.join(sorted(PROMPTS))}"
        )
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise UserError(
            f"prompts {path}: {path.suffix or 'no suffix'} is not a known kind of file; give a "
            ".txt (one prompt a line) or a .jsonl (one object with 'prompt' a line), or write "
            f"datasets:{path} to let the library datasets read it"
        )
    for where, line in text_lines(path):
        yield where, {"prompt": line} if kind == ".txt" else _json_row(line, where)


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines of a text file that are not blank, each after its place (``f, line 2``).

    The file is UTF-8 with or without a byte order mark, or UTF-16 or UTF-32 with one; its lines end
    as on Unix, on Windows or on an old Mac.

    Raises:
        UserError: the file cannot be read, or a line is no text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    coding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if coding is not None:
        try:
            data = data.decode(coding).encode("utf-8")
        except UnicodeError as error:
            said = f"{path}: its byte order mark says {coding.upper()}, but it is not"
            raise UserError(f"{said}; save it as UTF-8") from error
    # bytes.splitlines knows newlines alone: that of str would also cut at U+2028 inside a prompt
    for number, raw in enumerate(data.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 ({error.reason}); save it as UTF-8") from error
        if "\0" in line:
            raise UserError(
                f"{where}: zero bytes, as in UTF-16 without a mark; save the file as UTF-8"
            )
        if line:
            yield where, line


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_once, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if not isinstance(row, dict):
        example = '{"prompt": "a cat"}'
        raise UserError(f"{where}: a row must be an object such as {example}, got {line:.80}")
    return row


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r:.80} is given twice; keep one of them")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; leave the key out, or write null")
