"""A caption is the text of a prompt that comes with pictures, to edit them or to animate them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from dgpo import pictures

PICTURES = {"image": "RGB", "mask": "L"}
"""The keys of a prompt row that name a picture, and the mode in which it is read."""


class Caption(str):
    """A ``Caption`` is a text that carries its pictures.

    The pictures travel with the text through everything that passes texts on, so that nothing can
    lose them. Two captions of one text are equal as texts; their :attr:`pictures` may differ.

    Args:
        text: the prompt.
        files: for ``image`` and ``mask`` a file, or a picture.

    >>> caption = Caption("make it blue", {"image": Image.new("RGB", (64, 32))})
    >>> caption == "make it blue", caption.size_of("image")
    (True, (64, 32))
    """

    files: Mapping[str, Any]

    def __new__(cls, text: str, files: Mapping[str, Any]) -> Caption:
        made = super().__new__(cls, text)
        made.files = dict(files)
        return made

    @property
    def pictures(self) -> dict[str, Image.Image]:
        """Return the pictures; a file that is still remembered gives the same object."""
        return {
            key: _read(str(given), PICTURES[key]) if isinstance(given, (str, Path)) else given
            for key, given in self.files.items()
        }

    def size_of(self, key: str) -> tuple[int, int]:
        """Return the width and height of a picture in pixels."""
        given = self.files[key]
        return pictures.size_of(given) if isinstance(given, (str, Path)) else given.size

    def __reduce__(self) -> tuple[Any, ...]:
        return Caption, (str(self), dict(self.files))


def pictures_of(text: str) -> dict[str, Image.Image]:
    """Return the pictures of a text; a plain text has none."""
    return text.pictures if isinstance(text, Caption) else {}


@functools.lru_cache(maxsize=512)
def _read(file: str, mode: str) -> Image.Image:
    return pictures.open_picture(file).convert(mode)
