"""The gate for pictures: whatever a file holds becomes the RGB picture that a viewer would show."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dgpo.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""The files of a folder that are taken for pictures."""
_ORIENTATION = ExifTags.Base.Orientation
_ON_ITS_SIDE = range(5, 9)  # those of EXIF's eight orientations that swap width and height


class Picture(Image.Image):
    """A ``Picture`` is an RGB picture of Pillow whose pixels may still be on their way.

    Pillow reads a file when somebody first looks at it; a ``Picture`` waits for its pixels and
    copies them into Pillow's memory then, in the thread that looks. Who wants numbers takes
    ``pixels`` and spares the copy.

    Args:
        pixels: uint8 [H, W, 3] on the CPU, which nobody changes.
        arrived: returns once the pixels are there; None: they are.
    """

    _given: tuple[Tensor, Callable[[], Any] | None] | None = None

    def __init__(self, pixels: Tensor, arrived: Callable[[], Any] | None = None) -> None:
        super().__init__()
        height, width, _ = pixels.shape
        self._mode, self._size = "RGB", (width, height)
        self._given = pixels, arrived

    @property
    def pixels(self) -> Tensor | None:
        """The pixels, uint8 [H, W, 3]; None once Pillow has them, where they may change."""
        if (given := self._given) is None:
            return None
        pixels, arrived = given
        if arrived is not None:
            arrived()
        return pixels

    def load(self) -> Any:
        """Hand the pixels to Pillow if it has none; it asks for them before it does anything."""
        if (pixels := self.pixels) is not None:
            self.im = Image.fromarray(pixels.numpy()).im
            self._given = None  # last: another thread may be here, too
        return super().load()

    def copy(self) -> Image.Image:
        """Return a picture of the same pixels, which changes without this one."""
        given = self._given
        return super().copy() if given is None else Picture(*given)

    __copy__ = copy

    def __eq__(self, other: object) -> bool:
        """Return whether the other one is a picture that shows the same."""
        if isinstance(other, Image.Image) and other.mode == self.mode:
            return np.array_equal(array_of(self), array_of(other))
        return False


def array_of(image: Image.Image) -> np.ndarray:
    """Return the numbers of a picture; nobody may change them."""
    pixels = image.pixels if isinstance(image, Picture) else None
    return np.array(image) if pixels is None else pixels.numpy()


@contextmanager
def opened(
    source: str | Path | BinaryIO, name: str, formats: tuple[str, ...] | None = None
) -> Iterator[Image.Image]:
    """Open a picture file lazily, with its frames, its mode and its turn as they are.

    Args:
        source: the file, or an open stream.
        name: what errors call it.
        formats: the names of the formats that may be tried, as Pillow calls them; None for all.

    Raises:
        UserError: whatever Pillow raises, now or inside the block.
    """
    try:
        with ExitStack() as files:
            if isinstance(source, (str, Path)):
                # Pillow would map a file into memory, and mix up the pixels of a TIFF on its side
                source = files.enter_context(Path(source).open("rb"))
            yield files.enter_context(Image.open(source, formats=formats))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: too large: {error}; make it smaller") from error
    except Exception as error:  # broken files raise many things; all mean that it is no picture
        unknown = isinstance(error, UnidentifiedImageError)
        why = "of no known format" if unknown else str(error) or type(error).__name__
        raise UserError(f"{name} is no picture that can be read ({why})") from error


def open_picture(source: str | Path | BinaryIO, name: str = "") -> Image.Image:
    """Open a picture file as :func:`rgb` gives it, turned as its EXIF data says.

    The first frame of an animated file is taken, and a warning says so.

    Args:
        source: the file, or an open stream.
        name: what errors call it; by default the file's path.

    Raises:
        UserError: it is no picture, is broken or cut off, or has more pixels than Pillow allows
            (twice ``PIL.Image.MAX_IMAGE_PIXELS``).
    """
    name = name or str(source)
    with opened(source, name) as image:
        if getattr(image, "is_animated", False):
            warnings.warn(f"{name} is animated: its first frame is taken", stacklevel=2)
        return upright(image, name)


def size_of(file: str | Path, name: str = "") -> tuple[int, int]:
    """Return the width and height in pixels that :func:`open_picture` would give.

    The file's header is enough, except for an oblong PNG, which may say at its end that it lies on
    its side.

    Raises:
        UserError: see :func:`open_picture`.
    """
    with opened(file, name or str(file)) as image:
        width, height = image.size
        # Pillow turns a TIFF by itself, and gives its size as it will be
        turned = (
            image.format != "TIFF"
            and width != height
            and image.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
        )
    return (height, width) if turned else (width, height)


def upright(image: Image.Image, name: str = "the picture") -> Image.Image:
    """Return a picture as :func:`rgb` gives it, turned as its EXIF data says."""
    return rgb(ImageOps.exif_transpose(image), name)


def rgb(image: Image.Image, name: str = "the picture") -> Image.Image:
    """Return a picture of any mode as RGB of 8 bits; one that is RGB already is returned itself.

    Transparent pixels lie on white. Integers wider than 8 bits are read as 16 bits (0 to 65535),
    which is what Pillow writes for them; floats as 0 to 1, or as 0 to 255 where one is above 1.

    Raises:
        UserError: the numbers lie outside these ranges, or Pillow cannot convert the mode.

    >>> rgb(Image.new("I", (1, 1), 32768)).getpixel((0, 0))
    (128, 128, 128)
    >>> rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)
    """
    if image.mode[0] in "IF":
        image = _of_8_bits(image, name)
    try:
        if image.has_transparency_data:
            paper = Image.new("RGBA", image.size, "white")
            paper.alpha_composite(image.convert("RGBA"))
            image = paper
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise UserError(f"{name}: mode {image.mode} cannot be shown in RGB ({error})") from error


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures of a folder in natural order: 2.png before 10.png."""
    files = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    return sorted(files, key=lambda file: natural(file.name))


def natural(name: str) -> tuple[Any, ...]:
    """Return a key that sorts names as people count: the numbers in them by their value.

    >>> sorted(["10.png", "2.png", "a10", "a9", "02.png"], key=natural)
    ['02.png', '2.png', '10.png', 'a9', 'a10']
    """
    parts = re.split(r"([0-9]+)", name)
    numbered = [int(part) if place % 2 else part for place, part in enumerate(parts)]
    return numbered, name  # names that count alike, such as 02 and 2, in the order of text


def _of_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale grey numbers of more than 8 bits to 8 bits, with what is transparent made white."""
    pixels = np.asarray(image).astype(np.float64)
    low, high = float(pixels.min()), float(pixels.max())
    wide = image.mode[0] == "I"
    most = 65535.0 if wide else 1.0 if high <= 1 else 255.0
    if not 0 <= low <= high <= most:
        known = "0 to 65535" if wide else "0 to 1, or 0 to 255"
        raise UserError(
            f"{name}: grey numbers from {low:g} to {high:g} (mode {image.mode}); {known} can be "
            "shown: scale them"
        )
    if (clear := image.info.get("transparency")) is not None:
        pixels[pixels == clear] = most
    return Image.fromarray(np.rint(pixels * (255 / most)).astype(np.uint8))
