"""Picture files that nobody should trust: any mode, size and turn, damaged, cut off, or bombs."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from fuzz.parts import changed_bytes
from hostile_pictures import bomb

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F", "CMYK", "LAB"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("L", "P", "RGB"),
    "PPM": ("1", "L", "RGB", "I"),
    "TGA": ("L", "LA", "P", "RGB", "RGBA"),
}
"""Formats, and the modes that Pillow writes in them."""


@st.composite
def pictures(draw: st.DrawFn) -> tuple[Image.Image, str, dict[str, Any]]:
    """A picture of noise, the format in which it can be written, and how."""
    kind = draw(st.sampled_from(sorted(MODES)))
    mode = draw(st.sampled_from(MODES[kind]))
    width, height = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    noise = np.random.default_rng(draw(st.integers(0, 9)))
    if mode in ("I;16", "I", "F"):
        types = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
        values = noise.integers(0, 65536, (height, width)) / (65536 if mode == "F" else 1)
        image = Image.fromarray(values.astype(types[mode]))
    else:
        colors = noise.integers(0, 256, (height, width, 4), dtype=np.uint8)
        whole = Image.fromarray(colors)
        image = (whole if mode in ("RGBA", "LA") else whole.convert("RGB")).convert(mode)
    options: dict[str, Any] = {}
    if kind in ("PNG", "JPEG", "WEBP", "TIFF") and draw(st.booleans()):
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(0, 9))
        options["exif"] = exif
    if kind in ("PNG", "GIF") and mode in ("P", "L", "1") and draw(st.booleans()):
        options["transparency"] = draw(st.integers(0, 255))
    return image, kind, options


def encoded(picture: tuple[Image.Image, str, dict[str, Any]]) -> bytes:
    """A picture as the content of a file."""
    image, kind, options = picture
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


_SIDES = st.integers(0, 2**31 - 1)
FILES = st.one_of(
    pictures().map(encoded).flatmap(changed_bytes),
    pictures().map(encoded).flatmap(lambda data: st.integers(0, len(data)).map(lambda n: data[:n])),
    st.builds(
        bomb, st.sampled_from(["PNG", "BMP", "GIF", "PPM"]), *[st.integers(0, 2**31 - 1)] * 2
    ),
    st.binary(max_size=200),
)
"""The contents of files that may or may not be pictures."""
