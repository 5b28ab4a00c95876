"""What the mathematics of reward-weighted regression says, in float64."""

from __future__ import annotations

import pytest
import torch

from dgpo.algorithms import RWR
from dgpo.core import Groups
from oracles.toy import Toy, run_processes

CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def case() -> tuple[Toy, torch.Tensor]:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    t = Toy(Groups(Groups.contiguous(3, 4).index[order], 4, 3))
    return t, torch.randn(12, generator=torch.Generator().manual_seed(1)).double()


def test_weights_are_a_softmax_in_each_group():
    t, rewards = case()
    weights = RWR(temperature=0.5).advantages(rewards, t.groups)
    parts = [rewards[t.groups.index == g] for g in range(3)]
    within = torch.cat([r - r.mean() for r in parts]).square().mean().sqrt()
    for g, r in enumerate(parts):
        z = (r - r.mean()) / (r.std(unbiased=False) + 1e-4 * within)
        torch.testing.assert_close(weights[t.groups.index == g], 4 * (z / 0.5).softmax(0), **CLOSE)
    torch.testing.assert_close(t.groups.mean(weights), torch.ones(3).double(), **CLOSE)


def test_loss_is_the_weighted_mean_of_errors():
    t, rewards = case()
    t.advantages = RWR().advantages(rewards, t.groups)
    loss, _ = RWR().loss(t.points(ref=None, old=None))
    expected = (t.advantages * t.errors()[0]).sum() / 12
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(t.gradient(loss), t.gradient(expected), **CLOSE)


def test_an_infinite_temperature_is_supervised_fine_tuning():
    t, rewards = case()
    algorithm = RWR(temperature=1e12)
    t.advantages = algorithm.advantages(rewards, t.groups)
    expected = t.gradient(t.errors()[0].mean())
    torch.testing.assert_close(t.gradient(algorithm.loss(t.points())[0]), expected, **CLOSE)


def test_a_low_temperature_trains_the_best_sample_alone():
    t, rewards = case()
    rewards = rewards.argsort().argsort().double()  # no two are nearly equal
    weights = RWR(temperature=0.01).advantages(rewards, t.groups)
    best = t.groups.rank(rewards) == 0
    torch.testing.assert_close(weights, 4.0 * best.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_coldest_softmax_of_the_largest_advantages_is_finite(sign):
    rewards = torch.zeros(256)
    rewards[0] = sign
    algorithm = RWR(temperature=0.01, advantage_max=7)
    weights = algorithm.advantages(rewards, Groups.contiguous(1, 256))
    assert weights.isfinite().all() and weights.mean() == pytest.approx(1)


def test_a_group_on_two_processes_has_the_same_weights():
    t, rewards = case()
    whole = RWR().advantages(rewards, t.groups)

    def body(rank, reduce):
        rows = torch.arange(12).split([5, 7])[rank]
        return RWR().advantages(rewards[rows], Groups(t.groups.index[rows], 4, 3, reduce))

    torch.testing.assert_close(torch.cat(run_processes(body, 2)), whole, **CLOSE)
