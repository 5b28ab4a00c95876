"""Groups of pictures that were ranked before: a folder that people, models and other tools write.

``groups.jsonl`` in the folder holds one object for each group::

    {"prompt": "a red cat", "images": ["images/000000-00.png", ...], "rewards": [0.25, ...],
     "raters": {"ann": [0.0, ...]}, "metadata": {"tag": "colors"}}

``rewards`` has a finite number for each picture, higher is better. ``raters`` (what each of several
raters said) and ``metadata`` (what the prompt's row says beside its text) may be left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from dgpo.errors import UserError
from dgpo.prompts import Prompt, load_prompts
from dgpo.prompts.caption import PICTURES as SOURCES

FILE = "groups.jsonl"
PICTURES = "images"
_OURS = re.compile(r"(\d{6,})-\d+\.png")


@dataclass(frozen=True)
class RankedGroup(Prompt):
    """A prompt, pictures of it, and how good each of them is.

    Args:
        images: the files of the pictures, two or more.
        rewards: a number for each picture, higher is better.
        raters: the numbers of single raters, by their name.
    """

    images: tuple[Path, ...] = ()
    rewards: tuple[float, ...] = ()
    raters: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


class _Row(BaseModel):
    """A line of the file, as it is written."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1)
    images: Annotated[list[str], Field(min_length=2)]
    rewards: list[FiniteFloat]
    raters: dict[str, list[FiniteFloat]] = Field(default_factory=dict)
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_number_each(self) -> _Row:
        columns = {"rewards": self.rewards}
        columns |= {f"raters.{name}": values for name, values in self.raters.items()}
        for name, values in columns.items():
            if len(values) != len(self.images):
                raise ValueError(
                    f"{name} holds {len(values)} numbers for {len(self.images)} images; "
                    "give one for each"
                )
        if "prompt" in self.metadata:
            raise ValueError("metadata holds a 'prompt' of its own; take it out")
        return self


def read_groups(
    folder: str | Path, size: tuple[int | None, int | None] = (None, None)
) -> list[RankedGroup]:
    """Read a folder of ranked groups.

    Args:
        folder: holds ``groups.jsonl`` and, at or below it, the pictures.
        size: width and height that all pictures must have, in pixels; what is None must only be
            the same in all of them.

    Raises:
        UserError: what is missing or broken, with the file and its line; a path that leads out of
            the folder; a picture that cannot be read or is of another size.
    """
    place = Path(folder)
    file = place / FILE
    if not file.is_file():
        what = f"the folder has no {FILE}" if place.is_dir() else "there is no such folder"
        raise UserError(
            f"data.preferences = {str(folder)!r}: {what}; `dgpo collect` writes one, "
            "docs/offline.md says what it holds"
        )
    groups = []
    for where, line in _lines(file):
        group = _group(place, line, where)
        size = _checked_size(group.images, size, where)
        groups.append(group)
    if not groups:
        raise UserError(f"{file}: the file is empty; it needs at least one group")
    return groups


def refuse_existing_groups(folder: str | Path) -> None:
    """Refuse a folder that holds groups already.

    Raises:
        UserError: it does.
    """
    if (Path(folder) / FILE).exists():
        raise UserError(f"--out {folder}: it holds groups already; name another folder")


class GroupWriter:
    """Adds groups to a folder, which is made if it is not there.

    A group's pictures are written before its line, and the line is on the disk when :meth:`add`
    returns: whatever stops the writing, every line that is there stands for a whole group. One
    process writes a folder at a time.

    Args:
        folder: new, empty, or one that groups shall be added to.

    Raises:
        UserError: the file there does not end with a line.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file = self.folder / FILE
        (self.folder / PICTURES).mkdir(parents=True, exist_ok=True)
        if self._file.exists() and (text := self._file.read_bytes()) and text[-1:] != b"\n":
            raise UserError(
                f"{self._file}: the last line was cut off; delete it (its group is lost), and the "
                "others are whole"
            )
        names = (_OURS.fullmatch(file.name) for file in (self.folder / PICTURES).iterdir())
        self._next = 1 + max((int(name[1]) for name in names if name), default=-1)

    def add(
        self,
        prompt: str,
        images: Sequence[Image.Image],
        rewards: Sequence[float],
        *,
        raters: Mapping[str, Sequence[float]] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> int:
        """Write a group; its pictures become ``images/NUMBER-PLACE.png``, without loss.

        Args:
            prompt: the text.
            images: two or more pictures of it.
            rewards: a finite number for each, higher is better.
            raters: the numbers of single raters, by their name.
            metadata: what else the prompt's row says; JSON values.

        Returns:
            the group's number.

        Raises:
            UserError: the group could not be read back; nothing was written.
        """
        number = self._next
        names = [f"{PICTURES}/{number:06d}-{place:02d}.png" for place in range(len(images))]
        row: dict[str, Any] = {"prompt": prompt, "images": names, "rewards": _floats(rewards)}
        if raters:
            row["raters"] = {name: _floats(values) for name, values in raters.items()}
        if metadata:
            row["metadata"] = dict(metadata)
        try:
            line = json.dumps(row, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"group {prompt!r:.80}: its metadata is no JSON ({error})") from error
        _parsed(line, f"group {prompt!r:.80}")
        if not all(isinstance(image, Image.Image) for image in images):
            kind = type(images[0]).__name__
            raise UserError(f"group {prompt!r:.80}: groups hold pictures, got {kind}")
        self._next += 1
        for name, image in zip(names, images, strict=True):
            image.convert("RGB").save(self.folder / name)
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        return number


def _floats(values: Sequence[float]) -> list[float]:
    return [float(value) for value in values]


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    # split on newline bytes alone: str.splitlines would also cut at U+2028 inside a prompt
    for number, raw in enumerate(file.read_bytes().split(b"\n"), start=1):
        where = f"{file}, line {number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 ({error.reason}); save it as UTF-8") from error
        if line:
            yield where, line


def _parsed(line: str, where: str) -> _Row:
    try:
        return _Row.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        got = f" = {first['input']!r:.60}" if key and first["type"] != "missing" else ""
        raise UserError(f"{where}: {key}{got}{': ' if key else ''}{said}") from error


def _group(folder: Path, line: str, where: str) -> RankedGroup:
    row = _parsed(line, where)
    try:
        # as a row of a prompt file, whose 'image' may be what the pipeline starts from
        beside = {
            key: str(folder / row.metadata[key])
            for key in SOURCES
            if isinstance(row.metadata.get(key), str)
        }
        (prompt,) = load_prompts([{"prompt": row.prompt, **row.metadata, **beside}])
    except UserError as error:
        raise UserError(f"{where}: metadata: {error}") from error
    return RankedGroup(
        prompt.text,
        prompt.metadata,
        tuple(_inside(folder, name, where) for name in row.images),
        tuple(row.rewards),
        {name: tuple(values) for name, values in row.raters.items()},
        where=where,
    )


def _inside(folder: Path, name: str, where: str) -> Path:
    """The file behind a relative path, which must not lead out of the folder, nor by a link."""
    path = PurePosixPath(name)
    file = folder / path
    if path.is_absolute() or "\\" in name or ".." in path.parts or "\0" in name:
        raise UserError(
            f"{where}: image {name!r:.120}: give a path inside the folder, such as images/a.png"
        )
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{where}: image {name!r:.120}: the link leads out of the folder")
    if not file.is_file():
        raise UserError(f"{where}: image {name!r:.120}: there is no such file in {folder}")
    return file


def _checked_size(
    files: Sequence[Path], wanted: tuple[int | None, int | None], where: str
) -> tuple[int, int]:
    """The size of the pictures, which is what is wanted of it; only their headers are read."""
    for file in files:
        width, height = _size(file, where)
        found = (wanted[0] or width, wanted[1] or height)
        if found != (width, height):
            raise UserError(
                f"{where}: {file} is {width} x {height} pixels, and {found[0]} x {found[1]} are "
                "wanted: all pictures must have one size, that of rollout.call.height and width "
                "if the recipe sets them"
            )
        wanted = found
    assert wanted[0] is not None and wanted[1] is not None
    return wanted[0], wanted[1]


def _size(file: Path, where: str) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.size
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: {file} is no picture that can be read ({error})") from error
