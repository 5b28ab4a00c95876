"""Answers become rewards; raters agree or not."""

import json

import pytest
from pydantic import ValidationError

from dgpo.ranking.agreement import Agreement, agreement
from dgpo.ranking.answers import ANSWER, Likes, Order, Skip, Stars, mean, rewards_of
from dgpo.rewards.wrappers import Ranked


def test_likes_are_one_and_zero():
    assert rewards_of(Likes(liked=[2, 0]), 4) == [1, 0, 1, 0]
    assert rewards_of(Likes(liked=[]), 2) == [0, 0]


def test_an_order_is_spread_evenly_from_one_to_zero():
    assert rewards_of(Order(best_first=[3, 0, 2, 1]), 4) == pytest.approx([2 / 3, 0, 1 / 3, 1])


def test_those_left_out_of_an_order_tie_as_a_ranked_reward_has_it():
    ranked = Ranked(lambda images, prompts: [0.0, 5.0, 0.0, 9.0, 0.0])
    assert rewards_of(Order(best_first=[3, 1]), 5) == ranked([None] * 5, [""] * 5)  # pyright: ignore


def test_stars_are_scaled():
    assert rewards_of(Stars(stars=[1, 2, 3, 4, 5]), 5) == [0, 0.25, 0.5, 0.75, 1]


def test_no_opinion_is_no_reward():
    assert rewards_of(Skip(), 3) is None


@pytest.mark.parametrize(
    "answer", [Likes(liked=[3]), Likes(liked=[0, 0]), Order(best_first=[1, 1]), Stars(stars=[1, 2])]
)
def test_an_answer_must_fit_its_group(answer):
    with pytest.raises(ValueError):
        rewards_of(answer, 3)


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "stars", "stars": [6]},
        {"kind": "stars", "stars": [0]},
        {"kind": "likes", "liked": [-1]},
        {"kind": "likes", "liked": [1.5]},
        {"kind": "likes", "liked": [True]},
        {"kind": "likes", "liked": [0], "more": 1},
        {"kind": "best", "liked": [0]},
    ],
)
def test_what_is_no_answer_is_refused(given):
    with pytest.raises(ValidationError):
        ANSWER.validate_json(json.dumps(given))


def test_the_mean_of_raters_is_taken_picture_by_picture():
    assert mean([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]) == [1.0, 0.5, 0.0]


def test_agreement_counts_the_pairs_that_both_tell_apart():
    # ann: 0 > 1 > 2; bob: 0 = 1 > 2; cid: the reverse of ann
    ann, bob, cid = [1.0, 0.5, 0.0], [1.0, 1.0, 0.0], [0.0, 0.5, 1.0]
    assert agreement([{"ann": ann, "bob": bob}]) == Agreement(2, 2, 1)
    assert agreement([{"ann": ann, "cid": cid}]) == Agreement(0, 3, 1)
    both = agreement([{"ann": ann, "bob": bob, "cid": cid}, {"ann": ann}])
    assert both == Agreement(2, 7, 1) and both.share == pytest.approx(2 / 7)
    assert agreement([{"ann": ann}]).share is None
