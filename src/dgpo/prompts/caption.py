"""A caption is the text of a prompt that comes with pictures, to edit them or to animate them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps

from dgpo.errors import UserError

PICTURES = {"image": "RGB", "mask": "L"}
"""The keys of a prompt row that name a picture, and the mode in which it is read."""
_ORIENTATION = ExifTags.Base.Orientation
_ON_ITS_SIDE = range(5, 9)  # those of EXIF's eight orientations that swap width and height


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
        """Return the width and height of a picture in pixels.

        The file's header is enough, except for an oblong PNG, which may say at its end that it lies
        on its side.
        """
        given = self.files[key]
        if not isinstance(given, (str, Path)):
            return given.size
        with Image.open(given) as opened:
            width, height = opened.size
            turned = width != height and opened.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
        return (height, width) if turned else (width, height)

    def __reduce__(self) -> tuple[Any, ...]:
        return Caption, (str(self), dict(self.files))


def pictures_of(text: str) -> dict[str, Image.Image]:
    """Return the pictures of a text; a plain text has none."""
    return text.pictures if isinstance(text, Caption) else {}


@functools.lru_cache(maxsize=512)
def _read(file: str, mode: str) -> Image.Image:
    try:
        with Image.open(file) as opened:
            return ImageOps.exif_transpose(opened).convert(mode)
    except Exception as error:  # broken files raise many things; all mean that it is no picture
        raise UserError(f"picture {file}: it cannot be read ({error})") from error
