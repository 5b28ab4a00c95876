"""Picture files of any kind: an RGB picture as a viewer shows it, or one clear error."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from dgpo.pictures import open_picture, rgb, size_of
from dgpo.rewards.shipped.stand_in import brightness
from fuzz.parts import PROFILE, value_or_error
from fuzz.picture_files import FILES, encoded, pictures

SWAPPED = (5, 6, 7, 8)
"""The orientations of EXIF by which width and height change places."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures") / "picture"


@PROFILE
@given(picture=pictures())
def test_whole_files_are_opened_in_their_size(
    file: Path, picture: tuple[Image.Image, str, dict[str, Any]]
) -> None:
    image, _, options = picture
    file.write_bytes(encoded(picture))
    made = open_picture(file)
    turned = options.get("exif", {}).get(0x0112, 1) in SWAPPED
    assert made.mode == "RGB" and made.size == size_of(file)
    assert made.size == (image.size[::-1] if turned else image.size)
    (number,) = brightness([made], [""])
    assert 0 <= number <= 1


@PROFILE
@given(picture=pictures())
def test_grey_keeps_its_shade_whatever_its_width(
    file: Path, picture: tuple[Image.Image, str, dict[str, Any]]
) -> None:
    image, kind, _ = picture
    if image.mode not in ("I;16", "I", "F"):
        return
    most = 1.0 if image.mode == "F" else 65535.0
    file.write_bytes(encoded((image, kind, {})))
    wanted = np.asarray(image, float) * (255 / most)
    assert abs(np.asarray(open_picture(file), float) - wanted[..., None]).max() <= 0.5 + 1e-3


@PROFILE
@given(data=FILES)
def test_broken_files_are_one_error(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow thinks of a damaged file
        made = value_or_error(lambda: open_picture(file))
        value_or_error(lambda: size_of(file))
        again = value_or_error(lambda: open_picture(io.BytesIO(data), "it"))
    assert (made is None) == (again is None)
    assert made is None or (made.mode == "RGB" and made is rgb(made))
