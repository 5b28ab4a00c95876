"""Folders of ranked groups: what is written is read back, what is broken is named by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dgpo.errors import UserError
from dgpo.preferences import GroupWriter, read_groups


def pictures(count: int, width: int = 16, height: int = 8) -> list[Image.Image]:
    noise = np.random.default_rng(count).integers(0, 256, (count, height, width, 3), np.uint8)
    return [Image.fromarray(one) for one in noise]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    writer = GroupWriter(tmp_path / "groups")
    metadata = {"tag": "colors", "include": [{"class": "cat", "count": 1}]}
    raters = {"ann": [1, 0, 0.5]}
    assert writer.add("a cat", pictures(3), [0.5, 0, 1], raters=raters, metadata=metadata) == 0
    assert writer.add("a dog\u2028on two lines", pictures(2), [1e-7, -3.0]) == 1
    return writer.folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "groups.jsonl").read_text().split("\n") if line]


def test_what_is_written_is_read_back(folder: Path) -> None:
    cat, dog = read_groups(folder, (16, 8))
    assert (cat.text, cat.rewards, cat.raters) == ("a cat", (0.5, 0.0, 1.0), {"ann": (1, 0, 0.5)})
    assert cat.metadata["tag"] == "colors" and cat.metadata["include"][0]["count"] == 1
    assert (dog.text, dog.rewards, dog.metadata) == ("a dog\u2028on two lines", (1e-7, -3.0), {})
    for group, count in ((cat, 3), (dog, 2)):
        for file, image in zip(group.images, pictures(count), strict=True):
            with Image.open(file) as read:
                assert np.array_equal(np.asarray(read), np.asarray(image))


def test_a_second_writer_goes_on(folder: Path) -> None:
    left = folder / "images" / "000007-00.png"  # of a group whose line was never written
    pictures(1)[0].save(left)
    before = left.read_bytes()
    assert GroupWriter(folder).add("a bird", pictures(4), range(4)) == 8
    assert [group.text[:5] for group in read_groups(folder)] == ["a cat", "a dog", "a bir"]
    assert left.read_bytes() == before
    with (folder / "groups.jsonl").open("a") as stream:
        stream.write('{"prompt": "half a li')
    with pytest.raises(UserError, match="last line was cut off"):
        GroupWriter(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rewards": [1.0, 2.0]}, "rewards holds 2 numbers for 3 images"),
        ({"rewards": [1.0, 2.0, float("nan")]}, r"rewards.2 = nan: .*finite"),
        ({"rewards": [1.0, 2.0, float("inf")]}, r"rewards.2 = inf: .*finite"),
        ({"rewards": [1.0, 2.0, "3"]}, "rewards.2 = '3': .*valid number"),
        ({"rewards": [1.0, 2.0, True]}, "rewards.2 = True: .*valid number"),
        ({"raters": {"ann": [1.0]}}, "raters.ann holds 1 numbers for 3 images"),
        ({"reward": [1.0]}, "reward = .*not permitted"),
        ({"prompt": ""}, "prompt = '': .*at least 1"),
        ({"prompt": " "}, "'prompt' must be a text"),
        ({"images": ["a.png"]}, "images = .*at least 2"),
        ({"metadata": {"prompt": "b"}}, "a 'prompt' of its own"),
        ({"metadata": {"image": "gone.png"}}, "metadata: .*gone.png"),
    ],
)
def test_a_broken_line_is_named(folder: Path, change: dict[str, Any], said: str) -> None:
    first, second = lines(folder)
    text = json.dumps(second) + "\n\n" + json.dumps({**first, **change}) + "\n"
    (folder / "groups.jsonl").write_text(text)
    with pytest.raises(UserError, match=rf"groups.jsonl, line 3: .*{said}"):
        read_groups(folder)


@pytest.mark.parametrize("line", ["{", "[]", "null", '{"prompt": "a"}'])
def test_a_line_that_is_no_group_is_named(folder: Path, line: str) -> None:
    (folder / "groups.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"groups.jsonl, line 1: "):
        read_groups(folder)


@pytest.mark.parametrize(
    "name", ["../outside.png", "/etc/passwd", "images/../../outside.png", "..\\outside.png", "a\0"]
)
def test_a_path_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    pictures(1)[0].save(folder.parent / "outside.png")
    first, _ = lines(folder)
    first["images"][1] = name
    (folder / "groups.jsonl").write_text(json.dumps(first) + "\n")
    with pytest.raises(UserError, match=r"line 1: image .*give a path inside the folder"):
        read_groups(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    pictures(1)[0].save(folder.parent / "outside.png")
    place = folder / "images" / "000000-01.png"
    place.unlink()
    place.symlink_to(folder.parent / "outside.png")
    with pytest.raises(UserError, match=r"line 1: image .*link leads out"):
        read_groups(folder)


def test_pictures_are_there_whole_and_of_one_size(folder: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: .*00-00.png is 16 x 8 pixels, and 32 x 8"):
        read_groups(folder, (32, None))
    place = folder / "images" / "000001-01.png"
    pictures(1, width=8)[0].save(place)
    with pytest.raises(UserError, match=r"line 2: .*01-01.png is 8 x 8 pixels, and 16 x 8"):
        read_groups(folder)
    place.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"line 2: .*01-01.png is no picture"):
        read_groups(folder)
    place.unlink()
    with pytest.raises(UserError, match=r"line 2: image .*no such file"):
        read_groups(folder)


def test_an_empty_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.preferences = .*no such folder"):
        read_groups(tmp_path / "gone")
    with pytest.raises(UserError, match=r"data.preferences = .*no groups.jsonl"):
        read_groups(tmp_path)
    GroupWriter(tmp_path)
    (tmp_path / "groups.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty"):
        read_groups(tmp_path)


def test_what_could_not_be_read_back_is_not_written(folder: Path) -> None:
    writer, before = GroupWriter(folder), sorted(folder.rglob("*"))
    text = (folder / "groups.jsonl").read_text()
    for images, rewards, metadata in (
        (pictures(2), [0.0], None),
        (pictures(1), [0.0], None),
        (pictures(2), [0.0, float("nan")], None),
        (pictures(2), [0.0, 1.0], {"a": object()}),
        ([pictures(2), pictures(2)], [0.0, 1.0], None),  # videos
    ):
        with pytest.raises(UserError, match="group 'a cat'"):
            writer.add("a cat", images, rewards, metadata=metadata)  # pyright: ignore
    assert sorted(folder.rglob("*")) == before and (folder / "groups.jsonl").read_text() == text
