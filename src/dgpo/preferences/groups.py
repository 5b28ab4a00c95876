"""A folder of ranked groups can be written by people, models and other tools, and read here.

Its file ``groups.jsonl`` holds one object for each group::

    {"prompt": "a red cat", "images": ["images/000000-00.png", ...], "rewards": [0.25, ...],
     "raters": {"ann": [0.0, ...]}, "metadata": {"tag": "colors"}}

``rewards`` has a finite number for each picture; higher is better. ``raters`` (the numbers of
single raters) and ``metadata`` (the other columns of the prompt's row) may be left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from dgpo.disk import append_line
from dgpo.errors import UserError
from dgpo.pictures import rgb, size_of
from dgpo.prompts import Prompt, load_prompts
from dgpo.prompts.caption import PICTURES as SOURCES
from dgpo.prompts.files import text_lines

FILE = "groups.jsonl"
PICTURES = "images"
_OURS = re.compile(r"(\d{6,})-\d+\.png")


@dataclass(frozen=True)
class RankedGroup(Prompt):
    """A ``RankedGroup`` is a prompt with pictures of it, and how good each of them is.

    Args:
        images: the files of the pictures, two or more.
        rewards: a number for each picture; higher is better.
        raters: the numbers of single raters, by their names.
    """

    images: tuple[Path, ...] = ()
    rewards: tuple[float, ...] = ()
    raters: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


class _Row(BaseModel):
    """One line of the file, as it is written."""

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
        folder: holds ``groups.jsonl`` and, at any depth, the pictures.
        size: the width and height in pixels that all pictures must have; None stands for the size
            of the first picture.

    Raises:
        UserError: something is missing or broken (the error names the file and the line), a path
            leads out of the folder, or a picture cannot be read or has another size.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    ...     number = GroupWriter(folder).add("a red square", pictures, rewards=[1.0, 0.0])
    ...     (group,) = read_groups(folder)
    >>> number, group.text, group.rewards, [file.name for file in group.images]
    (0, 'a red square', (1.0, 0.0), ['000000-00.png', '000000-01.png'])
    """
    place = Path(folder)
    file = place / FILE
    if not file.is_file():
        what = f"the folder has no {FILE}" if place.is_dir() else "there is no such folder"
        raise UserError(
            f"data.preferences = {str(folder)!r}: {what}; `dgpo collect` writes such a folder, "
            "docs/offline.md says what is in it"
        )
    groups = []
    for where, line in text_lines(file):
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
    """A ``GroupWriter`` adds groups to a folder, which it makes if there is none.

    It writes a group's pictures before its line, and the line is on the disk when :meth:`add`
    returns: whatever stops the writing, every line stands for a whole group. Only one process may
    write to a folder at a time.

    Args:
        folder: the folder, with or without groups in it.

    Raises:
        UserError: the last line of the file in the folder was cut off.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file = self.folder / FILE
        (self.folder / PICTURES).mkdir(parents=True, exist_ok=True)
        if self._file.exists() and (text := self._file.read_bytes()) and text[-1:] != b"\n":
            raise UserError(
                f"{self._file}: the last line was cut off; delete it: its group is lost, but the "
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
            prompt: the prompt's text.
            images: two or more pictures of it.
            rewards: a finite number for each picture; higher is better.
            raters: the numbers of single raters, by their names.
            metadata: the other columns of the prompt's row, as JSON values.

        Returns:
            The group's number.

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
            raise UserError(f"group {prompt!r:.80}: its metadata is not JSON ({error})") from error
        _parsed(line, f"group {prompt!r:.80}")
        if not all(isinstance(image, Image.Image) for image in images):
            kind = type(images[0]).__name__
            raise UserError(f"group {prompt!r:.80}: a group must hold pictures, got {kind}")
        self._next += 1
        # first the pictures, then the line: a line stands for a whole group, whatever happens
        for name, image in zip(names, images, strict=True):
            rgb(image).save(self.folder / name)
        append_line(self._file, line)
        return number


def _floats(values: Sequence[float]) -> list[float]:
    return [float(value) for value in values]


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
    """Return the file of a relative path, which must not leave the folder, not even by a link."""
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
    """Return the one size that all pictures have; only their headers are read."""
    for file in files:
        width, height = size_of(file, f"{where}: {file}")
        found = (wanted[0] or width, wanted[1] or height)
        if found != (width, height):
            raise UserError(
                f"{where}: {file} is {width} x {height} pixels, and {found[0]} x {found[1]} are "
                "wanted: all pictures must have one size, and rollout.call.height and width must "
                "be that size if the recipe sets them"
            )
        wanted = found
    assert wanted[0] is not None and wanted[1] is not None
    return wanted[0], wanted[1]
