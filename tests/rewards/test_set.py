"""A set of rewards: weights, columns, and answers that are refused."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from dgpo.errors import UserError
from dgpo.prompts import Prompt, load_prompts
from dgpo.rewards import load_rewards

IMAGES = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "red")]
PROMPTS = [Prompt("a", {"text": "1"}), Prompt("b", {"text": "2", "k": 5}), Prompt("c")]


def test_weighted_sum_of_several():
    def length(images, prompts, **columns):
        return [len(p) * 10 for p in prompts]

    rewards = load_rewards({"redness": 2.0, "dgpo.rewards.shipped.stand_in:brightness": -0.5})
    by_name, total = rewards(IMAGES, PROMPTS)
    assert list(by_name) == ["redness", "dgpo.rewards.shipped.stand_in:brightness"]
    torch.testing.assert_close(by_name["redness"], torch.tensor([1.0, -0.5, 1.0]))
    torch.testing.assert_close(total, torch.tensor([2.0, -1.0, 2.0]) - 0.5 / 3)
    both = load_rewards(["redness", length])
    assert both.weights == {"redness": 1.0, "length": 1.0}
    torch.testing.assert_close(both(IMAGES, PROMPTS).total, torch.tensor([11.0, 9.5, 11.0]))


def test_a_reward_gets_the_columns_it_names_with_none_where_a_row_lacks_them():
    got = {}

    def some(images, prompts, text):
        got["some"] = (prompts, text)
        return [0.0] * len(images)

    def every(images, prompts, **columns):
        got["every"] = columns
        return [0.0] * len(images)

    load_rewards([some, every])(IMAGES, PROMPTS)
    assert got["some"] == (["a", "b", "c"], ["1", "2", None])
    assert got["every"] == {"text": ["1", "2", None], "k": [None, 5, None]}


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.tensor])
def test_what_a_list_of_numbers_may_be(kind):
    rewards = load_rewards([lambda images, prompts: kind([1.0, 2.0, 3.0])])
    assert rewards(IMAGES, PROMPTS).total.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([1.0, 2.0], ["returned 2 numbers for 3 images"]),
        ([1.0, math.nan, 2.0], ["row 1", "'b'", "nan", "finite"]),
        ([1.0, 2.0, math.inf], ["row 2", "inf"]),
        ([1.0, "high", 2.0], ["row 1", "'high'", "not a number"]),
        ([None, 1, 2], ["row 0", "None"]),
        (3.0, ["3.0", "list"]),
        (None, ["None", "list"]),
        ("abc", ["'abc'"]),
        ([[1.0], [2.0], [3.0]], ["row 0", "[1.0]"]),
    ],
)
def test_an_answer_that_is_not_one_finite_number_an_image(answer, words):
    def bad_reward(images, prompts, **columns):
        return answer

    with pytest.raises(UserError) as error:
        load_rewards([bad_reward])(IMAGES, PROMPTS)
    for word in ("bad_reward", *words):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({}, "none given"),
        ([], "none given"),
        ({"redness": 0.0}, "weight"),
        ({"redness": math.nan}, "weight"),
        (["redness", "redness"], "twice"),
        ({"rednes": 1}, "did you mean"),
        ([lambda images: [1.0]], "images, prompts"),
        ({"dgpo.rewards.set:__doc__": 1}, "no function"),
    ],
)
def test_rewards_that_cannot_be_used(spec, word):
    with pytest.raises(UserError, match=word):
        load_rewards(spec)


def test_errors_name_the_row_as_the_user_counts_it(tmp_path):
    rewards = load_rewards(["redness", "pocket_geneval"])
    rows = [{"prompt": f"a cat {i}", "rewards": ["redness"]} for i in range(9)]
    rows.append({"prompt": "a dog", "rewards": ["pocket_geneval"]})
    with pytest.raises(UserError, match=r"'pocket_geneval', prompt row 9: "):
        rewards.check([Prompt(row["prompt"], {"rewards": row["rewards"]}) for row in rows])
    with pytest.raises(UserError, match=r"'pocket_geneval', prompt row 9: "):
        rewards.check(load_prompts(rows))
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"'pocket_geneval', .*rows.jsonl, line 19: "):
        rewards.check(load_prompts(file))
    with pytest.raises(UserError, match=r"'pocket_geneval', .*rows.jsonl, line 19: "):
        load_rewards("pocket_geneval").check(load_prompts(file)[9:])


def test_check_is_asked_before_a_run():
    class Picky:
        def __call__(self, images, prompts):
            return [0.0] * len(images)

        def check(self, prompts):
            for row, prompt in enumerate(prompts):
                if "k" not in prompt.metadata:
                    raise UserError(f"row {row} has no k")

    with pytest.raises(UserError, match="row 0 has no k"):
        load_rewards(["redness", Picky()]).check(PROMPTS)
    load_rewards(Picky).check(PROMPTS[1:2])  # a class is made into its object


def test_a_column_that_hides_an_argument_is_refused():
    with pytest.raises(UserError, match="'images'"):
        load_rewards([lambda images, prompts, **columns: [0.0]])(
            IMAGES[:1], [Prompt("a", {"images": 1})]
        )
