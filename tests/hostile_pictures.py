"""Headers of picture files that nobody should trust."""

from __future__ import annotations

import struct
import zlib


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG, without its pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"x"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def bomb(kind: str, width: int, height: int) -> bytes:
    """The header of a file that says that it is huge."""
    heads = {
        "PNG": png_header(width, height),
        "BMP": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0),
        "GIF": b"GIF89a" + struct.pack("<HHBBB", width % 65536, height % 65536, 0, 0, 0),
        "PPM": b"P6 %d %d 255 " % (width, height),
    }
    return heads[kind]
