"""Scenes and captions: what is drawn obeys the specification."""

import numpy as np
import pytest

from dgpo.pocket.scenes import (
    BACKGROUND,
    CATEGORIES,
    COLORS,
    MARGIN,
    all_metadata,
    caption_of,
    coverage,
    draw_scene,
    parse_caption,
    render,
)
from tools.pretrain.data import draw_scenes, wrong_caption

ROWS = all_metadata()
SCENES = draw_scenes(1500, seed=5)


def test_every_caption_is_read_back_to_the_metadata_it_was_made_from():
    rows = [row for category in CATEGORIES for row in ROWS[category]]
    assert len(rows) == 464
    for row in rows:
        assert parse_caption(row["prompt"]) == row
        assert caption_of(row["tag"], row["include"]) == row["prompt"]


@pytest.mark.parametrize("caption", ["a photo of a cat", "two squares", "a photo of five squares"])
def test_other_captions_are_refused_with_an_example(caption):
    with pytest.raises(ValueError, match="a photo of a red circle"):
        parse_caption(caption)


@pytest.mark.parametrize("link", ["and", "left of"])
def test_one_shape_named_twice_is_refused_since_no_picture_would_be_right(link):
    with pytest.raises(ValueError, match="a photo of two circles"):
        parse_caption(f"a photo of a red circle {link} a blue circle")


def test_shapes_have_the_wanted_size_and_lie_apart_inside_the_canvas():
    for scene in SCENES:
        largest = 0.18 if len(scene.shapes) < 3 else 0.15
        for i, one in enumerate(scene.shapes):
            assert 0.13 <= one.r <= largest
            edge = 1.1 * one.r + 0.02
            assert edge <= one.x <= 1 - edge
            assert edge <= one.y <= 1 - edge
            for other in scene.shapes[i + 1 :]:
                gap = max(abs(one.x - other.x), abs(one.y - other.y)) - one.r - other.r
                assert gap >= MARGIN - 1e-9


def test_relations_are_clear():
    scenes = [s for s in SCENES if s.metadata["tag"] == "position"]
    assert len(scenes) > 200
    for scene in scenes:
        first, second = scene.shapes
        along, across = first.x - second.x, first.y - second.y
        relation = scene.metadata["include"][0]["position"][0]
        if relation in ("above", "below"):
            along, across = across, along
        assert (along < 0) == (relation in ("left of", "above"))
        assert abs(along) > 1.2 * abs(across)


def test_counted_shapes_share_one_color():
    # left open by the caption, but a count should not be a matter of colours
    scenes = [s for s in SCENES if s.metadata["tag"] == "counting"]
    assert {len(s.shapes) for s in scenes} == {1, 2, 3, 4}
    assert all(len({shape.color for shape in s.shapes}) == 1 for s in scenes)


@pytest.mark.parametrize(
    ("shape", "area"), [("circle", np.pi), ("square", 3.24), ("cross", 2.3616), ("triangle", 1.85)]
)
def test_coverage_adds_up_to_the_area(shape, area):
    grid = np.arange(64) + 0.5 - 32
    for radius in (6.0, 13.0):
        total = coverage(shape, grid[None, :] - 0.3, grid[:, None] + 0.2, radius).sum()
        assert total == pytest.approx(area * radius**2, rel=0.03)


def test_background_and_colors_are_exact():
    scene = draw_scene(parse_caption("a photo of a red square"), np.random.default_rng(0))
    image = render([scene])[0]
    shape = scene.shapes[0]
    assert tuple(image[int(shape.y * 32), int(shape.x * 32)]) == COLORS["red"]
    assert tuple(image[0, 0]) == BACKGROUND


def test_wrong_captions_stay_captions_and_are_wrong_about_as_often_as_stated():
    rng = np.random.default_rng(0)
    right = {category: [] for category in CATEGORIES}
    for scene in SCENES:
        caption = wrong_caption(scene.metadata, rng)
        assert parse_caption(caption)["tag"] == scene.metadata["tag"]
        right[scene.metadata["tag"]].append(caption == scene.caption)
    # a caption that would name a shape or a colour twice stays right: one of the three (five) other
    # values after one mistake, two of nine (four of twenty-five) pairs of values after two
    expected = {
        "single_object": 0.45,
        "two_object": 0.7**2 + 2 * 0.7 * 0.3 / 3 + 0.3**2 * 2 / 9,
        "counting": 0.66,
        "colors": 0.43,
        "position": 0.55,
        "color_attr": 0.78**2 + 2 * 0.78 * 0.22 / 5 + 0.22**2 * 4 / 25,
    }
    for category, share in expected.items():
        error = (share * (1 - share) / len(right[category])) ** 0.5
        assert np.mean(right[category]) == pytest.approx(share, abs=4 * error)
