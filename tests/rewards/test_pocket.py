"""The pocket rewards agree with the verifier and read captions where rows say nothing."""

import numpy as np
import pytest
from PIL import Image

from dgpo.errors import UserError
from dgpo.pocket.scenes import draw_scene, render
from dgpo.prompts import Prompt, load_prompts
from dgpo.rewards import load_rewards
from dgpo.rewards.shipped.pocket import pocket_geneval, pocket_geneval_strict


def drawn(prompts):
    rng = np.random.default_rng(0)
    scenes = [draw_scene({**p.metadata, "prompt": p.text}, rng) for p in prompts]
    return [Image.fromarray(pixels) for pixels in render(scenes)]


def test_renders_of_the_held_out_prompts_score_one():
    prompts = load_prompts("pocket-geneval/test")[:48]
    rewards = load_rewards({"pocket_geneval": 1.0, "pocket_geneval_strict": 1.0})
    scores = rewards(drawn(prompts), prompts).by_name
    assert scores["pocket_geneval"].mean() == 1.0
    assert scores["pocket_geneval_strict"].mean() == 1.0


def test_soft_is_between_and_strict_is_all_or_nothing():
    circle = drawn([Prompt("a photo of a red circle", {"include": [RED_CIRCLE]})])
    captions = ["a photo of a red circle", "a photo of a blue circle", "a photo of two circles"]
    soft = pocket_geneval(circle * 3, captions)
    assert soft[0] == 1.0 and 0 < soft[1] < 1 and 0 < soft[2] < 1
    assert pocket_geneval_strict(circle * 3, captions) == [1.0, 0.0, 0.0]


RED_CIRCLE = {"class": "circle", "count": 1, "color": "red"}


def test_the_row_goes_before_the_caption():
    image = drawn([Prompt("a photo of a red circle", {"include": [RED_CIRCLE]})])
    rows = [Prompt("whatever it is called", {"include": [RED_CIRCLE]})]
    load_rewards("pocket_geneval").check(rows)
    assert load_rewards("pocket_geneval")(image, rows).total.tolist() == [1.0]
    mixed = [*rows, Prompt("a photo of a blue circle")]
    assert load_rewards("pocket_geneval_strict")(image * 2, mixed).total.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Prompt("a cat"), ["row 1", "'a cat'", "a photo of a red circle"]),
        (Prompt("a", {"include": [{"shape": "circle"}]}), ["row 1", "include", "class"]),
        (Prompt("a", {"include": "circle"}), ["row 1", "include"]),
    ],
)
def test_rows_that_are_no_scene_are_refused_before_the_run(prompt, words):
    with pytest.raises(UserError) as error:
        load_rewards("pocket_geneval").check([Prompt("a photo of a circle"), prompt])
    for word in words:
        assert word in str(error.value)


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(UserError, match="64 x 48"):
        pocket_geneval([Image.new("RGB", (64, 48))], ["a photo of a circle"])
