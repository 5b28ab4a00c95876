"""Keeps on the disk what was ranked: pictures as files, groups and answers in SQLite.

An answer is on the disk before it is acknowledged, and none is ever changed: a rater's later answer
to the same group is a row of its own, and counts instead of the earlier one.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any

from PIL import Image

from dgpo.disk import replace_file, sync
from dgpo.errors import UserError
from dgpo.pictures import rgb
from dgpo.prompts.caption import PICTURES, Caption
from dgpo.ranking.answers import ANSWER, Answer, rewards_of

FILE = "ranking.sqlite"
_TABLES = """
CREATE TABLE IF NOT EXISTS groups (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL,
    metadata TEXT NOT NULL, size INTEGER NOT NULL, place INTEGER, time REAL NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL REFERENCES groups (id), rater TEXT NOT NULL,
    answer TEXT NOT NULL, seconds REAL, time REAL NOT NULL);
CREATE INDEX IF NOT EXISTS answers_of_group ON answers (id);
"""


@dataclass(frozen=True)
class Group:
    """Pictures of one prompt.

    Args:
        id: a digest of the prompt and the pixels, so that the same group is known again.
        prompt: the text.
        size: how many pictures it has.
        metadata: what else the prompt row says, as far as JSON can hold it.
    """

    id: str
    prompt: str
    size: int
    metadata: dict[str, Any]

    @property
    def files(self) -> list[str]:
        """The pictures' files, relative to the folder."""
        return [f"images/{self.id}-{place}.png" for place in range(self.size)]

    @property
    def sources(self) -> dict[str, str]:
        """The files that the prompt speaks of, ``image`` and ``mask``, relative to the folder."""
        files = {key: _source_file(self.id, key) for key in PICTURES}
        return {key: file for key, file in files.items() if self.metadata.get(key) == file}


class Store:
    """A folder of groups and answers. Threads may share it, and so may processes.

    Args:
        folder: made if it is not there.

    Raises:
        UserError: the folder or the database cannot be used.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock = threading.RLock()
        try:
            (self.folder / "images").mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                self.folder / FILE, timeout=30, check_same_thread=False
            )
            # a commit returns when its bytes, and the folder's, are on the disk
            self._database.execute("PRAGMA synchronous = EXTRA")
            self._database.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"rankings in {self.folder}: {error}; choose another folder") from error

    def close(self) -> None:
        """Close the database of groups and answers."""
        with self._lock:
            self._database.close()

    def add(
        self,
        prompt: str,
        images: Sequence[Image.Image],
        metadata: Mapping[str, Any] | None = None,
        place: int | None = None,
    ) -> Group:
        """Keep a group; one that is there already is left as it is.

        Args:
            prompt: the text.
            images: 2 pictures or more.
            metadata: what else the prompt row says; what JSON cannot hold is left out. Its
                ``image`` and ``mask`` are kept beside the group's own pictures.
            place: the group's number in a series that is drawn one after the other.

        Raises:
            UserError: there are fewer than two images, or one is no picture.
        """
        _check(images)
        pictures = [rgb(image) for image in images]
        sources = _sources(metadata or {})
        id = _digest(prompt, [*pictures, *sources.values()])
        kept = {**(metadata or {}), **{key: _source_file(id, key) for key in sources}}
        group = Group(id, prompt, len(pictures), _plain(kept))
        with self._lock:
            if self._rows("SELECT 1 FROM groups WHERE id = ?", (group.id,)):
                return group
            for file, picture in zip(group.files, pictures, strict=True):
                _write(self.folder / file, picture)
            for key, file in group.sources.items():
                _write(self.folder / file, sources[key])
            sync(self.folder / "images")
            with self._database:
                self._database.execute(
                    "INSERT OR IGNORE INTO groups (id, prompt, metadata, size, place, time) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (group.id, prompt, json.dumps(group.metadata), group.size, place, time()),
                )
        return group

    def answer(
        self, group: Group, rater: str, answer: Answer, seconds: float | None = None
    ) -> None:
        """Keep what a rater says of a group; returns when it is on the disk.

        Args:
            group: the group.
            rater: the person's name.
            answer: what they say.
            seconds: how long they looked at it.

        Raises:
            ValueError: the answer does not fit the group.
        """
        rewards_of(answer, group.size)
        with self._lock, self._database:
            self._database.execute(
                "INSERT INTO answers (id, rater, answer, seconds, time) VALUES (?, ?, ?, ?, ?)",
                (group.id, rater, answer.model_dump_json(), seconds, time()),
            )

    def group(self, id: str) -> Group:
        """Look a group up by its id.

        Raises:
            KeyError: there is none.
        """
        query = "SELECT id, prompt, size, metadata FROM groups WHERE id = ?"
        for row in self._rows(query, (id,)):
            return _group(row)
        raise KeyError(id)

    def groups(self) -> list[Group]:
        """All groups, in the order in which they came."""
        rows = self._rows("SELECT id, prompt, size, metadata FROM groups ORDER BY number")
        return [_group(row) for row in rows]

    def answers(self, group: Group) -> dict[str, Answer]:
        """What each rater said last of a group, in the order of their first answers."""
        rows = self._rows(
            "SELECT rater, answer FROM answers WHERE id = ? ORDER BY number", (group.id,)
        )
        return {rater: ANSWER.validate_json(answer) for rater, answer in rows}

    def rewards(self, group: Group) -> dict[str, list[float]]:
        """The rewards that each rater gave; those who had no opinion are left out."""
        said = {name: rewards_of(own, group.size) for name, own in self.answers(group).items()}
        return {name: rewards for name, rewards in said.items() if rewards is not None}

    def last_of(self, rater: str) -> Group | None:
        """The group that a rater has answered last."""
        rows = self._rows(
            "SELECT id FROM answers WHERE rater = ? ORDER BY number DESC LIMIT 1", (rater,)
        )
        return self.group(rows[0][0]) if rows else None

    def counts(self) -> dict[str, int]:
        """How many groups each rater has answered."""
        return dict(
            self._rows("SELECT rater, COUNT(DISTINCT id) FROM answers GROUP BY rater ORDER BY 1")
        )

    def next_place(self) -> int:
        """One more than the largest ``place`` of a group."""
        return self._rows("SELECT COALESCE(MAX(place) + 1, 0) FROM groups")[0][0]

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return self._database.execute(query, values).fetchall()


def _group(row: tuple[str, str, int, str]) -> Group:
    return Group(*row[:3], json.loads(row[3]))


def _check(images: Sequence[Any]) -> None:
    if len(images) < 2:
        raise UserError(f"a group of {len(images)} pictures: people compare 2 or more")
    for image in images:
        if not isinstance(image, Image.Image):
            raise UserError(
                f"people are shown pictures, and the pipeline makes {type(image).__name__}: "
                "videos and sounds cannot be ranked yet"
            )


def _source_file(id: str, key: str) -> str:
    return f"images/{id}-{key}.png"


def _sources(metadata: Mapping[str, Any]) -> dict[str, Image.Image]:
    """The pictures of a prompt row, which are files or pictures."""
    given = {key: metadata[key] for key in PICTURES if metadata.get(key) is not None}
    pictures = Caption("", given).pictures
    return {key: rgb(picture).convert(PICTURES[key]) for key, picture in pictures.items()}


def _digest(prompt: str, pictures: Sequence[Image.Image]) -> str:
    digest = hashlib.sha256(prompt.encode())
    for picture in pictures:
        digest.update(f"\0{picture.width}x{picture.height}\0".encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()[:32]


def _write(file: Path, picture: Image.Image) -> None:
    replace_file(file, lambda whole: picture.save(whole, "PNG"))


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a prompt row that JSON can hold; missing columns are left out."""
    plain = {}
    for key, value in metadata.items():
        if value is None:
            continue
        try:
            plain[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            continue
    return plain
