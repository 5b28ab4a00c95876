"""The verifier: right on what was drawn, wrong on what was not, and its soft score by hand."""

import numpy as np
import pytest

from dgpo.pocket.scenes import Scene, Shape, parse_caption, render
from dgpo.pocket.verifier import Found, find_objects, judge, verify
from tools.pretrain.data import draw_scenes

SCENES = draw_scenes(2000, seed=11)
IMAGES = render(SCENES)


def test_ground_truth_is_right():
    strict = [verify(i, s.metadata).strict for i, s in zip(IMAGES, SCENES, strict=True)]
    assert np.mean(strict) >= 0.999


def test_shuffled_captions_are_wrong():
    order = np.random.default_rng(0).permutation(len(SCENES))
    strict = [verify(IMAGES[i], SCENES[j].metadata).strict for i, j in enumerate(order)]
    assert np.mean(strict) <= 0.05


def test_places_and_colors_are_read_back():
    for image, scene in zip(IMAGES[:300], SCENES[:300], strict=True):
        found = sorted(find_objects(image), key=lambda f: (f.x, f.y))
        wanted = sorted(scene.shapes, key=lambda s: (s.x, s.y))
        assert [(f.shape, f.color) for f in found] == [(s.shape, s.color) for s in wanted]
        for f, s in zip(found, wanted, strict=True):
            assert abs(f.x - 32 * s.x) < 0.5
            lower = 0.2333 * s.r if s.shape == "triangle" else 0.0  # of its centroid
            assert abs(f.y - 32 * (s.y + lower)) < 0.5


def test_an_empty_canvas_has_nothing_and_a_stain_is_unknown():
    empty = np.full((32, 32, 3), 225, np.uint8)
    assert find_objects(empty) == []
    stained = empty.copy()
    stained[10:12, 4:28] = (40, 80, 225)
    (stain,) = find_objects(stained)
    assert (stain.shape, stain.color) == ("unknown", "blue")


def test_a_color_off_the_palette_is_unknown():
    scene = Scene(parse_caption("a photo of a circle"), (Shape("circle", "red", 0.5, 0.5, 0.17),))
    image = render([scene])[0].astype(float)
    mixed = image + (image[..., :1] - image[..., 1:2]) * np.array([-0.4, 0.8, 0.8])
    assert [f.color for f in find_objects(np.clip(mixed, 0, 255))] == ["unknown"]
    assert not verify(np.clip(mixed, 0, 255), scene.metadata).strict


def thing(shape, color="red", x=10.0, y=10.0):
    return Found(shape, color, x, y, 1.0)


RIGHT_PAIR = [thing("circle", "red", 5, 10), thing("square", "blue", 20, 11)]


@pytest.mark.parametrize(
    ("caption", "found", "strict", "soft"),
    [
        ("a photo of a circle", [thing("circle")], True, 1.0),
        ("a photo of a circle", [], False, 0.5),  # nothing else is there either
        ("a photo of a circle", [thing("square")], False, 0.25),
        ("a photo of a circle", [thing("circle"), thing("square")], False, 0.75),
        ("a photo of a circle", [thing("circle"), thing("circle")], False, 0.5),
        ("a photo of a circle", [thing("circle", "unknown")], False, 1.0),
        ("a photo of three squares", [thing("square")] * 3, True, 1.0),
        ("a photo of three squares", [thing("square")] * 2, False, (2 / 3 + 1) / 2),
        ("a photo of a red circle", [thing("circle", "red")], True, 1.0),
        ("a photo of a red circle", [thing("circle", "blue")], False, 2 / 3),
        ("a photo of a red circle", [thing("circle")] * 2, False, 1 / 3),
        ("a photo of a circle and a square", RIGHT_PAIR, True, 1.0),
        ("a photo of a circle and a square", RIGHT_PAIR[:1], False, 2 / 3),
        ("a photo of a circle left of a square", RIGHT_PAIR, True, 1.0),
        ("a photo of a circle right of a square", RIGHT_PAIR, False, 3 / 4),
        ("a photo of a circle above a square", RIGHT_PAIR, False, 3 / 4),
        ("a photo of a circle left of a square", RIGHT_PAIR[:1], False, 2 / 4),
        ("a photo of a red circle and a blue square", RIGHT_PAIR, True, 1.0),
        ("a photo of a blue circle and a red square", RIGHT_PAIR, False, 3 / 5),
    ],
)
def test_scores_derived_by_hand(caption, found, strict, soft):
    verdict = judge(found, parse_caption(caption))
    assert verdict.strict is strict
    assert verdict.soft == pytest.approx(soft)


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\[32, 32, 3\]"):
        find_objects(np.zeros((64, 64, 3)))
