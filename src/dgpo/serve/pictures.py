"""Opens pictures from strangers, PNG and WebP, whose size is known before they are unpacked."""

from __future__ import annotations

import io
import struct

from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from dgpo.errors import UserError
from dgpo.pictures import upright

READERS = {"PNG": PngImageFile, "WEBP": WebPImageFile}
FORMATS = "PNG or WebP"


class BadPicture(UserError):
    """The bytes are no picture that this server takes."""


def size_of(data: bytes) -> tuple[str, int, int]:
    """Read format, width and height from the header alone.

    Pillow allocates the canvas of a WebP as soon as it is opened, so its size must be known before.

    Raises:
        BadPicture: the header belongs to neither format.
    """
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
            return ("PNG", *struct.unpack(">II", data[16:24]))
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return ("WEBP", *_webp_size(data))
    except (struct.error, IndexError) as error:
        raise BadPicture("the header is cut off") from error
    raise BadPicture(f"not {FORMATS}")


def _webp_size(data: bytes) -> tuple[int, int]:
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X":
        wide, high = body[4:7], body[7:10]
        if len(high) < 3:
            raise BadPicture("the header is cut off")
        return int.from_bytes(wide, "little") + 1, int.from_bytes(high, "little") + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack("<I", body[1:5])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", body[6:10])
        return width & 0x3FFF, height & 0x3FFF
    raise BadPicture("an unknown kind of WebP")


def open_picture(data: bytes) -> Image.Image:
    """Open a picture, in RGB.

    Raises:
        BadPicture: it cannot be read, or it is animated.
    """
    kind, width, height = size_of(data)
    try:
        # not Image.open, which has a bound of its own: whoever asked for the size has bounded it
        with READERS[kind](io.BytesIO(data)) as image:
            if image.size != (width, height):
                raise BadPicture("its header contradicts itself")
            if getattr(image, "is_animated", False):
                raise BadPicture("it is animated; send its frames one by one")
            return upright(image)
    except BadPicture:
        raise
    except Exception as error:  # broken files raise many things
        raise BadPicture("it cannot be read") from error
