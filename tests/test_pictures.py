"""The gate for pictures: what a viewer would show is what is scored, or one clear error is told."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dgpo.errors import UserError
from dgpo.pictures import Picture, array_of, natural, open_picture, pictures_in, rgb, size_of
from hostile_pictures import png_header

SOURCE = Path(__file__).parents[1] / "src" / "dgpo"
WHITE, RED, BLUE, BLACK = (255, 255, 255), (255, 0, 0), (0, 0, 255), (0, 0, 0)


def saved(image: Image.Image, file: Path, **options: Any) -> Path:
    image.save(file, **options)
    return file


def seen(file: Path) -> list[tuple[int, ...]]:
    """The pixels of a small picture, row after row."""
    return [tuple(pixel) for row in np.asarray(open_picture(file)) for pixel in row.tolist()]


def grey(*values: float, kind: Any = np.uint16) -> Image.Image:
    return Image.fromarray(np.array([values], kind))


def test_16_bit_grey_is_scaled_and_not_cut_off(tmp_path: Path) -> None:
    for suffix in ("png", "tiff"):
        file = saved(grey(0, 257, 32768, 65535), tmp_path / f"a.{suffix}")
        assert seen(file) == [(v,) * 3 for v in (0, 1, 128, 255)]
    assert rgb(Image.new("I", (1, 1), 32768)).getpixel((0, 0)) == (128, 128, 128)


def test_floats_are_0_to_1_or_0_to_255(tmp_path: Path) -> None:
    for values in ((0.0, 0.5, 1.0), (0.0, 127.5, 255.0)):
        file = saved(grey(*values, kind=np.float32), tmp_path / "a.tiff")
        assert seen(file) == [(v,) * 3 for v in (0, 128, 255)]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (grey(0, 256, kind=np.float32), "grey numbers from 0 to 256 (mode F)"),
        (grey(0, float("nan"), kind=np.float32), "grey numbers from nan to nan (mode F)"),
        (grey(-1, 5, kind=np.int32), "grey numbers from -1 to 5 (mode I)"),
        (grey(0, 70000, kind=np.int32), "grey numbers from 0 to 70000 (mode I)"),
    ],
    ids=["large floats", "nan", "negative", "32 bits"],
)
def test_numbers_without_a_known_scale_are_refused(
    tmp_path: Path, image: Image.Image, words: str
) -> None:
    file = saved(image, tmp_path / "a.tiff")
    with pytest.raises(UserError, match=re.escape(f"{file}: {words}")):
        open_picture(file)


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (*RED, 255))
    assert seen(saved(rgba, tmp_path / "rgba.png")) == [WHITE, RED]
    assert rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)
    assert seen(saved(Image.new("LA", (1, 1), (9, 0)), tmp_path / "la.png")) == [WHITE]
    palette = Image.new("P", (2, 1))
    palette.putpalette([*BLUE, *RED])
    palette.putpixel((1, 0), 1)
    assert seen(saved(palette, tmp_path / "p.png")) == [BLUE, RED]
    for kind in ("png", "gif"):
        assert seen(saved(palette, tmp_path / f"t.{kind}", transparency=0)) == [WHITE, RED]
    several = saved(palette, tmp_path / "several.png", transparency=bytes([0, 255]))
    assert seen(several) == [WHITE, RED]
    color = saved(Image.new("RGB", (1, 1), BLUE), tmp_path / "rgb.png", transparency=BLUE)
    assert seen(color) == [WHITE]
    deep = saved(grey(0, 300), tmp_path / "deep.png", transparency=300)
    assert seen(deep) == [BLACK, WHITE]


def test_other_modes(tmp_path: Path) -> None:
    assert seen(saved(Image.new("1", (1, 1), 1), tmp_path / "1.png")) == [WHITE]
    assert seen(saved(Image.new("L", (1, 1), 77), tmp_path / "l.png")) == [(77, 77, 77)]
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert seen(saved(ink, tmp_path / "c.tiff"))[0] == RED
    red, green, blue = seen(saved(ink, tmp_path / "c.jpg", quality=100))[0]
    assert red > 250 and green < 5 and blue < 5
    plain = Image.new("RGB", (1, 1))
    assert rgb(plain) is plain


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff", "grey.tiff"])
def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path, kind: str) -> None:
    image = Image.new("L" if kind == "grey.tiff" else "RGB", (32, 16), "white")
    image.paste("black", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: the left becomes the top
    file = saved(image, tmp_path / f"a.{kind}", exif=exif)
    made = open_picture(file)
    assert made.size == size_of(file) == (16, 32)
    rows = np.asarray(made).mean((1, 2))
    assert rows[4] < 40 and rows[28] > 215


def test_the_first_frame_is_taken_and_that_is_said(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    for kind in ("gif", "png", "webp"):
        options = {"lossless": True} if kind == "webp" else {}
        file = saved(red, tmp_path / f"a.{kind}", save_all=True, append_images=[blue], **options)
        with pytest.warns(UserWarning, match=f"a.{kind} is animated: its first frame is taken"):
            assert seen(file)[0] == RED


def test_a_bomb_is_one_error_with_its_size_and_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(png_header(30_000, 30_000))
    for call in (open_picture, size_of):
        with pytest.raises(UserError, match=r"bomb\.png: too large: .*900000000.*178956970"):
            call(file)


def broken(how: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    whole = buffer.getvalue()
    return {
        "nothing": b"",
        "text": b"no picture",
        "cut off": whole[: len(whole) // 2],
        "header": png_header(8, 8),
        "damaged": whole[:60] + bytes(40) + whole[100:],
    }[how]


@pytest.mark.parametrize("how", ["nothing", "text", "cut off", "header", "damaged"])
def test_a_broken_file_is_one_error_with_its_path(tmp_path: Path, how: str) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(broken(how))
    with pytest.raises(UserError, match=r"a\.png is no picture that can be read"):
        open_picture(file)
    with pytest.raises(UserError, match=r"gone\.png is no picture that can be read"):
        open_picture(tmp_path / "gone.png")


def test_names_are_sorted_as_people_count(tmp_path: Path) -> None:
    names = ["1.png", "2.PNG", "10.png", "11.jpg", "a2b10.webp", "a10b1.webp"]
    for name in reversed(names):
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    assert [file.name for file in pictures_in(tmp_path)] == names
    assert sorted(["02", "2", "b", "1", ""], key=natural) == ["", "1", "02", "2", "b"]


def test_no_picture_passes_beside_the_gate() -> None:
    for file in SOURCE.rglob("*.py"):
        code = re.sub(r'""".*?"""', "", file.read_text("utf-8"), flags=re.DOTALL)
        beside = re.findall(r"""Image\.open\(|\.convert\(["']RGB["']\)""", code)
        assert not beside or file == SOURCE / "pictures.py", (file, beside)


def waiting(arrived: Any = None) -> tuple[Picture, Image.Image]:
    """A picture that Pillow has not read yet, and the same one as Pillow makes it."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    return Picture(torch.from_numpy(pixels), arrived), Image.fromarray(pixels)


@pytest.mark.parametrize(
    "look",
    [
        np.asarray,
        lambda image: np.asarray(rgb(image)),
        lambda image: np.asarray(image.convert("L")),
        lambda image: np.asarray(image.resize((3, 3))),
        lambda image: np.asarray(image.crop((1, 1, 3, 3))),
        lambda image: np.asarray(image.copy()),
        lambda image: np.asarray(copy.deepcopy(image)),
        lambda image: np.asarray(pickle.loads(pickle.dumps(image))),
        lambda image: np.asarray(image.split()[1]),
        lambda image: np.asarray(Image.blend(image, Image.new("RGB", (4, 6)), 0.5)),
        lambda image: np.asarray([image.getpixel((3, 5)), image.getextrema()[0]], object),
        lambda image: np.asarray(image.histogram()),
        lambda image: np.asarray(image.size),
    ],
)
def test_a_picture_on_its_way_is_one_of_pillow_for_whoever_looks(look: Any) -> None:
    picture, plain = waiting()
    assert np.array_equal(look(picture), look(plain))
    assert picture == plain and plain == picture and picture.copy() == picture


def test_pixels_are_waited_for_when_they_are_looked_at() -> None:
    waits: list[int] = []
    picture, plain = waiting(lambda: waits.append(1))
    other = picture.copy()
    assert isinstance(other, Picture) and picture.size == (4, 6) and not waits
    assert np.array_equal(array_of(picture), np.asarray(plain)) and waits == [1]
    picture.load()
    assert picture.pixels is None and waits == [1, 1]
    assert np.array_equal(array_of(picture), np.asarray(plain)) and waits == [1, 1]


def test_who_draws_into_a_picture_changes_nobody_elses() -> None:
    picture, plain = waiting()
    other, given = picture.copy(), picture.pixels
    ImageDraw.Draw(picture).rectangle((0, 0, 9, 9), fill=RED)
    assert np.array_equal(array_of(picture), np.asarray(Image.new("RGB", (4, 6), RED)))
    assert other == plain and picture != plain and picture != "a picture"
    assert given is not None and np.array_equal(given.numpy(), np.asarray(plain))
