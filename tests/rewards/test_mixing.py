"""Several rewards: what they amount to, whom each prompt asks, places within a group."""

import math

import pytest
import torch
from PIL import Image

from dgpo.core.groups import Groups
from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.rewards import load_rewards
from dgpo.rewards.mixing import mix, routed
from dgpo.rewards.wrappers import Ranked

GROUPS = Groups.contiguous(3, 4)


def numbers(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(12, generator=torch.Generator().manual_seed(seed))


def both(*weights: float) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float64).expand(12, -1)


def test_gdpo_is_the_sum_of_deviations_standardized_over_the_batch():
    a, b = numbers(0), numbers(1, 1000.0)
    found = mix({"a": a, "b": b}, both(1.0, 0.5), GROUPS, "gdpo").merit
    parts = []
    for x in (a.double(), b.double()):
        x = x.view(3, 4)
        parts.append((x - x.mean(1, keepdim=True)) / (x.std(1, unbiased=False, keepdim=True)))
    whole = parts[0] + 0.5 * parts[1]
    torch.testing.assert_close(
        found.double(), (whole / whole.std(unbiased=False)).flatten(), rtol=1e-3, atol=1e-3
    )
    assert found.view(3, 4).sum(1).abs().max() < 1e-5
    # the unit of a reward does not matter, which it does in a sum
    again = mix({"a": a, "b": b / 1000}, both(1.0, 0.5), GROUPS, "gdpo").merit
    torch.testing.assert_close(found, again, rtol=1e-3, atol=1e-3)


def test_the_sum_and_the_shares():
    a, b = numbers(0), numbers(1)
    found = mix({"a": a, "b": b}, both(2.0, -1.0), GROUPS)
    torch.testing.assert_close(found.merit, 2 * a - b)
    assert torch.equal(found.merit, found.total) and not found.rounded
    shares = [found.figures[f"advantage_share/{name}"] for name in "ab"]
    assert sum(shares) == pytest.approx(1)
    centred = [x - GROUPS.each(GROUPS.mean(x)) for x in (2 * a, 2 * a - b)]
    assert shares[0] == pytest.approx(
        float((centred[0] * centred[1]).sum() / centred[1].square().sum())
    )
    assert found.figures["reward_spread/b"] == pytest.approx(float(GROUPS.std(b).mean()))
    assert set(mix({"a": a}, both(1.0), GROUPS).figures) == {"reward/a"}


def test_two_opposite_rewards_have_equal_shares_whatever_their_units():
    """A deviation of 0.04 and one of 4e-8, beside which 1e-4 was everything."""
    a = 0.5 + numbers(0, 0.04)
    for one in (1.0, -1.0):
        found = mix({"a": a, "b": one * 1e-6 * a}, both(1.0, 1.0), GROUPS, "gdpo")
        shares = [found.figures[f"advantage_share/{name}"] for name in "ab"]
        assert shares == pytest.approx([0.5, 0.5], abs=1e-6)
        # opposite ones leave nothing but rounding, which is no preference
        assert GROUPS.spread(found.merit).tolist() == [one > 0] * 3
    summed = mix({"a": a, "b": -1e-6 * a}, both(1.0, 1e6), GROUPS)
    assert not GROUPS.spread(summed.merit).any() and summed.total.abs().max() > 0
    one = mix({"a": a}, both(1.0), GROUPS, "gdpo").merit
    other = mix({"a": 1e-6 * a}, both(1.0), GROUPS, "gdpo").merit
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combine", ["sum", "gdpo"])
def test_large_rewards_are_rewards(combine):
    a = numbers(0)
    expected = mix({"a": a}, both(1.0), GROUPS, combine).merit
    large = mix({"a": 1e20 * a, "b": 1e37 * a}, both(1.0, 1.0), GROUPS, combine)
    assert all(math.isfinite(value) for value in large.figures.values())
    merit = GROUPS.normalize(large.merit)
    torch.testing.assert_close(merit, GROUPS.normalize(expected), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"10 x a 3e\+38, is infinite in float32"):
        mix({"a": torch.full((12,), 3e38)}, both(10.0), GROUPS, combine)


def test_a_deviation_that_is_mere_rounding_is_named():
    a = 1000.0 + 5e-5 * numbers(0)  # neighbours in float32 are 6e-5 apart
    assert mix({"a": a, "b": a - 1000}, both(1.0, 1.0), GROUPS).rounded == ["a"]
    assert mix({"a": numbers(0), "b": torch.ones(12)}, both(1.0, 1.0), GROUPS).rounded == []


def test_a_prompt_names_its_rewards():
    calls = {}

    def one(images, prompts, **columns):
        calls["one"] = (prompts, columns)
        return [1.0] * len(images)

    def two(images, prompts):
        calls["two"] = prompts
        return [10.0] * len(images)

    rows = [
        Prompt("a", {"rewards": ["one"], "k": 1}),
        Prompt("b", {"rewards": {"two": 3.0, "one": None}}),
        Prompt("c"),
    ]
    images = [Image.new("RGB", (4, 4))] * 3
    by_name, total = load_rewards([one, two])(images, rows)
    assert calls == {"one": (["a", "c"], {"k": [1, None]}), "two": ["b", "c"]}
    assert by_name["one"].isnan().tolist() == [False, True, False]
    assert total.tolist() == [1.0, 30.0, 11.0]
    weights = routed(rows, {"one": 1.0, "two": 1.0})
    found = mix(
        {name: value.repeat_interleave(4) for name, value in by_name.items()},
        weights.repeat_interleave(4, 0),
        GROUPS,
        "gdpo",
    )
    assert found.figures["reward/one"] == 1.0 and found.merit.tolist() == [0.0] * 12


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["on"], "did you mean 'one'"),
        ({"one": 0}, "other than 0"),
        ({"one": math.inf}, "finite"),
        ({"one": "much"}, "finite"),
        ([], "at least one"),
        ("one", "list of names"),
    ],
)
def test_a_row_that_names_what_is_not_there(given, word):
    rewards = load_rewards({"redness": 1.0})
    rows = [Prompt("a", {"rewards": given})]
    with pytest.raises(UserError, match=word):
        routed(rows, {"one": 1.0, "two": 1.0})
    with pytest.raises(UserError, match="rewards = "):
        rewards.check(rows)


def test_places_within_a_group():
    def value(images, prompts, v):
        return v

    ranked = load_rewards({"redness": {"rank": True, "weight": 2}})
    reds = [Image.new("RGB", (4, 4), (r, 0, 0)) for r in (0, 200, 100, 100)]
    row = [Prompt("a")] * 4
    assert ranked.score(reds, row, [0] * 4).by_name["redness"].tolist() == [0.0, 1.0, 0.5, 0.5]
    assert ranked.score(reds, row, [0, 0, 1, 1]).by_name["redness"].tolist() == [0, 1, 0.5, 0.5]
    assert max(ranked(reds, row).by_name["redness"].tolist()) < 1  # in no group: the number
    rows = [Prompt("a", {"v": v, "other": 1}) for v in (-1e9, 3.0, 2.0)]
    found = load_rewards([Ranked(value)]).score(reds[:3], rows, [0] * 3).by_name["ranked_value"]
    assert found.tolist() == [0.0, 1.0, 0.5]


def test_a_reward_that_compares_needs_a_group():
    def best(images, prompts):
        return [float(place == 0) for place in range(len(images))]

    best.group_wise = True
    rewards = load_rewards([best])
    images, rows = [Image.new("RGB", (4, 4))] * 4, [Prompt("a")] * 4
    assert rewards.score(images, rows, [0, 0, 1, 1]).by_name["best"].tolist() == [1, 0, 1, 0]
    rewards.trial(images, rows)
    with pytest.raises(UserError, match=r"eval\.metrics"):
        rewards(images, rows)
