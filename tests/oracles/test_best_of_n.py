"""Best of n: which samples are chosen, and that the rest is supervised fine-tuning."""

from __future__ import annotations

import torch

from dgpo.algorithms import BestOfN
from dgpo.core import Groups
from oracles.toy import Toy

CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def test_the_best_of_each_group_are_chosen_and_of_equals_the_first():
    groups = Groups(torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]), 4, 2)
    rewards = torch.tensor([1.0, 5, 7, 5, 3, 5, 3, 0])
    assert BestOfN().advantages(rewards, groups).tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert BestOfN(top_k=2).advantages(rewards, groups).tolist() == [0, 1, 1, 1, 1, 0, 0, 0]


def test_all_of_each_group_is_supervised_fine_tuning():
    t = Toy(Groups.contiguous(3, 4))
    algorithm = BestOfN(top_k=4)
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(1)).double()
    t.advantages = algorithm.advantages(rewards, t.groups)
    assert torch.equal(t.advantages, torch.ones(12, dtype=torch.float64))
    loss, _ = algorithm.loss(t.points(ref=None, old=None))
    expected = t.errors()[0].mean()
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(t.gradient(loss), t.gradient(expected), **CLOSE)


def test_the_chosen_are_trained_and_no_others():
    t = Toy(Groups.contiguous(3, 4))
    algorithm = BestOfN(top_k=2)
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(1)).double()
    t.advantages = algorithm.advantages(rewards, t.groups)
    rows = t.advantages.nonzero()[:, 0]
    loss, _ = algorithm.loss(t.points(rows, Groups(t.groups.index[rows], 2, 3)))
    best = rewards.reshape(3, 4).argsort(1, descending=True)[:, :2] + 4 * torch.arange(3)[:, None]
    torch.testing.assert_close(loss, t.errors()[0][best.flatten()].mean(), **CLOSE)
