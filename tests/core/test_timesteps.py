from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from dgpo.core import Level, TimestepChoice
from dgpo.errors import UserError

# the 10-step schedule with shift 3
SHIFTED = [0.999, 0.963, 0.922, 0.874, 0.817, 0.749, 0.666, 0.562, 0.428, 0.249]
LEVELS = [Level(torch.tensor(1000 * s), s) for s in SHIFTED]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(choice: TimestepChoice, levels=LEVELS, count: int = 300) -> list[list[int]]:
    generator = seeded()
    return [choice.choose(levels, generator) for _ in range(count)]


def test_levels_are_distinct_shuffled_and_from_the_noisy_part():
    all_draws = draws(TimestepChoice())
    assert all(len(set(d)) == 4 for d in all_draws)
    assert {i for d in all_draws for i in d} == set(range(7))
    assert any(d != sorted(d) for d in all_draws)


def test_pure_noise_is_not_trained_in_every_iteration():
    """Trap 5: index 0 is drawn as often as any other, 4 times of 7."""
    all_draws = draws(TimestepChoice(), count=2000)
    share = sum(0 in d for d in all_draws) / len(all_draws)
    assert abs(share - 4 / 7) < 0.05


def test_every_process_draws_the_same_levels():
    choice = TimestepChoice()
    assert choice.choose(LEVELS, seeded(3)) == choice.choose(LEVELS, seeded(3))


def test_t_min_is_a_noise_level():
    choice = TimestepChoice(t_min=0.562)
    assert choice.indices is None
    assert {i for d in draws(choice) for i in d} == set(range(8))


def test_t_min_of_an_inverted_schedule_keeps_the_noisy_part_too():
    inverted = [Level(level.timestep, 1 - level.sigma) for level in LEVELS]
    assert {i for d in draws(TimestepChoice(t_min=0.5), inverted) for i in d} == set(range(8))


def test_without_limits_every_level_is_drawn():
    choice = TimestepChoice(count=10, indices=None)
    assert sorted(choice.choose(LEVELS, seeded())) == list(range(10))


def test_settings_survive_a_round_trip():
    for choice in (TimestepChoice(), TimestepChoice(t_min=0.3), TimestepChoice(indices=None)):
        assert TimestepChoice.model_validate(choice.model_dump()) == choice
    assert TimestepChoice.model_validate({"indices": [0, 4]}).indices == (0, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count"),
        ({"indices": (3, 1)}, "first <= last"),
        ({"indices": (-1, 5)}, "first <= last"),
        ({"indices": (0, 2)}, "fewer than"),
        ({"indices": (0, 6), "t_min": 0.3}, "not both"),
        ({"t_min": 1.0}, "t_min"),
        ({"tmin": 0.3}, "tmin"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TimestepChoice(**settings)


@pytest.mark.parametrize(
    ("choice", "levels", "message"),
    [
        (TimestepChoice(), LEVELS[:5], r"indices=\[0, 6\].*0\.\.4.*rollout\.steps"),
        (TimestepChoice(t_min=0.9), LEVELS, "leaves 3 of 10 levels"),
        (TimestepChoice(indices=None, count=11), LEVELS, "leaves 10 of 10 levels"),
    ],
)
def test_a_schedule_that_is_too_short_is_told_with_the_way_out(choice, levels, message):
    with pytest.raises(UserError, match=message):
        choice.choose(levels, seeded())
