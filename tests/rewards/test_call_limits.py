"""Rewards that raise, hang, die or answer nonsense: tried again, then the end or a lost group."""

import math
import threading
import time

import pytest
from PIL import Image

from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.rewards import RewardFailure, load_rewards
from dgpo.rewards.call_limits import MAX_HANGING
from dgpo.rewards.scoring import Scoring

IMAGES = [Image.new("RGB", (4, 4))] * 6
ROWS = [Prompt(text) for text in "aabbcc"]
PLACES = [0, 0, 1, 1, 2, 2]


class Faulty:
    """Does ``fault`` whenever it sees prompt b, for so many calls."""

    __name__ = "faulty"

    def __init__(self, fault, times=math.inf):
        self.fault, self.times, self.calls = fault, times, []

    def __call__(self, images, prompts):
        self.calls.append(list(prompts))
        right = [float(len(self.calls))] * len(images)
        if "b" not in prompts or self.times <= 0:
            return right
        self.times -= 1
        return self.fault(right)


def nan(right):
    return [math.nan, *right[1:]]


def short(right):
    return right[1:]


def raises(right):
    raise ValueError("out of luck")


def dies(right):
    raise SystemExit(3)


def hangs(right):
    time.sleep(5)
    return right


FAULTS = [(nan, "nan"), (short, "numbers for"), (raises, "out of luck"), (dies, "SystemExit")]


@pytest.mark.parametrize(("fault", "word"), FAULTS)
def test_a_fault_ends_the_run_with_one_error(fault, word):
    reward = Faulty(fault)
    rewards = load_rewards({reward: 1.0})
    with pytest.raises(UserError, match=word) as error:
        rewards.score(IMAGES, ROWS, PLACES)
    assert "'faulty'" in str(error.value) and len(reward.calls) == 1


@pytest.mark.parametrize(("fault", "word"), FAULTS)
def test_a_fault_loses_its_group_alone(fault, word):
    rewards = load_rewards({Faulty(fault): {"on_error": "skip_group"}})
    found = rewards.score(IMAGES, ROWS, PLACES)
    assert list(found.lost) == [1] and word in found.lost[1]
    assert found.by_name["faulty"].isnan().tolist() == [False, False, True, True, False, False]
    with pytest.raises(UserError, match=word):  # in no group there is nothing to leave out
        rewards(IMAGES, ROWS)


@pytest.mark.parametrize(("fault", "word"), FAULTS)
def test_a_fault_that_passes_is_tried_again(fault, word):
    reward = Faulty(fault, times=2)
    rewards = load_rewards({reward: {"retries": 2, "pause": 0}})
    assert rewards(IMAGES, ROWS).total.tolist() == [3.0] * 6
    with pytest.raises(UserError, match=r"tried 3 times"):
        load_rewards({Faulty(fault, 3): {"retries": 2, "pause": 0}})(IMAGES, ROWS)


def test_pauses_grow(monkeypatch):
    slept = []
    monkeypatch.setattr("dgpo.rewards.call_limits.time.sleep", slept.append)
    with pytest.raises(UserError):
        load_rewards({Faulty(raises): {"retries": 3, "pause": 0.5}})(IMAGES, ROWS)
    assert slept == [0.5, 1.0, 2.0]


def test_what_the_user_must_do_is_not_tried_again():
    def asks(right):
        raise UserError("set DGPO_THING")

    reward = Faulty(asks)
    with pytest.raises(RewardFailure, match=r"^set DGPO_THING$"):
        load_rewards({reward: {"retries": 5, "pause": 9}})(IMAGES, ROWS)
    assert len(reward.calls) == 1


def test_a_call_that_hangs_is_left_behind():
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no answer within 0\.2 s"):
        load_rewards({Faulty(hangs): {"timeout": 0.2}})(IMAGES, ROWS)
    reward = Faulty(hangs)
    skips = load_rewards({reward: {"timeout": 0.2, "on_error": "skip_group"}})
    assert list(skips.score(IMAGES, ROWS, PLACES).lost) == [0, 1, 2]
    assert len(reward.calls) == 1 and time.monotonic() - began < 4
    reward.times = 0
    assert not skips.score(IMAGES, ROWS, PLACES).lost  # and it may come back


def test_calls_that_hang_do_not_pile_up():
    gate, reward = threading.Event(), Faulty(lambda right: gate.wait() and right)
    rewards = load_rewards({reward: {"timeout": 0.02, "on_error": "skip_group"}})
    for _ in range(MAX_HANGING + 3):
        found = rewards.score(IMAGES, ROWS, PLACES)
    assert len(reward.calls) == MAX_HANGING and f"{MAX_HANGING} calls hang" in found.lost[0]
    gate.set()


def test_a_lost_group_costs_the_other_rewards_nothing():
    seen = []

    def other(images, prompts):
        seen.append(list(prompts))
        return [1.0] * len(images)

    rewards = load_rewards({Faulty(raises): {"on_error": "skip_group"}, other: 1.0})
    assert list(rewards.score(IMAGES, ROWS, PLACES).lost) == [1]
    assert seen == [["a", "a", "c", "c"]]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 4, 6])
def test_groups_are_scored_whole_and_in_order(overlap, batch):
    reward = Faulty(raises, times=0)
    rewards, prompts = load_rewards({reward: 1.0}), [Prompt(text) for text in "abc"]
    with Scoring(rewards, prompts, 2, overlap) as scoring:
        for start in range(0, 6, batch):
            scoring.add(IMAGES[start : start + batch])
        found = scoring.finish()
    assert [text for call in reward.calls for text in call] == list("aabbcc")
    assert all(len(call) % 2 == 0 for call in reward.calls)
    assert found.by_name["faulty"].tolist() == sorted(found.by_name["faulty"].tolist())
    assert found.weights.shape == (6, 1)


def test_a_failure_in_the_thread_stops_the_sampling():
    rewards = load_rewards({Faulty(raises): 1.0})
    with (
        pytest.raises(UserError, match="out of luck"),
        Scoring(rewards, [Prompt("b")] * 1000, 1, overlap=True) as scoring,
    ):
        for _ in range(1000):
            scoring.add(IMAGES[:1])
            time.sleep(0.005)
        raise AssertionError("sampled to the end")
