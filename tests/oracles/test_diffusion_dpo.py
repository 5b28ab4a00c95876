"""What the mathematics of Diffusion-DPO says, in float64."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from dgpo.algorithms import DGPO, DiffusionDPO
from dgpo.core import Groups
from oracles.toy import Toy

CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def test_loss_and_gradient_are_those_of_the_formula():
    """On the best and the worst of groups of four, picked by hand."""
    t = Toy(Groups.contiguous(3, 4))
    rewards = torch.tensor([2, 1, 4, 3, 0, 9, 8, 7, 5, 5, 6, 5], dtype=torch.float64)
    algorithm = DiffusionDPO(beta=7)
    better, worse = [2, 5, 10], [1, 4, 8]
    t.advantages = algorithm.advantages(rewards, t.groups)
    assert t.advantages.nonzero()[:, 0].tolist() == sorted(better + worse)
    rows = t.advantages.nonzero()[:, 0]
    loss, metrics = algorithm.loss(t.points(rows, Groups(t.groups.index[rows], 2, 3)))
    error, ref_error = t.errors()
    gain = error - ref_error
    expected = -logsigmoid(-(7 / 2) * (gain[better] - gain[worse]))
    torch.testing.assert_close(loss, expected.mean(), **CLOSE)
    torch.testing.assert_close(t.gradient(loss), t.gradient(expected.mean()), **CLOSE)
    assert 0 < metrics["weight"] < 1


def test_it_is_dgpo_on_pairs():
    t = Toy(Groups.contiguous(3, 2))
    rewards = torch.tensor([1.0, 0, 3, 5, 2, 1], dtype=torch.float64)
    pairs = DiffusionDPO(beta=7)
    t.advantages = pairs.advantages(rewards, t.groups)
    assert t.advantages.tolist() == [1, -1, -1, 1, 1, -1]
    # z-scores of two are +1 and -1, but for the constant beside the deviation
    groupwise = DGPO().advantages(rewards, t.groups)
    torch.testing.assert_close(groupwise, t.advantages, rtol=1e-3, atol=0)
    dgpo = DGPO(beta=7, clip=None, kl=0, loss_scale="paper")
    ours, theirs = pairs.loss(t.points()), dgpo.loss(t.points())
    torch.testing.assert_close(ours[0], theirs[0], **CLOSE)
    torch.testing.assert_close(t.gradient(ours[0]), t.gradient(theirs[0]), **CLOSE)


def test_of_equals_the_first_is_taken():
    groups = Groups(torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]), 4, 2)
    rewards = torch.tensor([1.0, 3, 1, 3, 0, 3, 0, 3])
    assert DiffusionDPO().advantages(rewards, groups).tolist() == [1, 0, 0, 0, -1, 0, 0, 0]


def test_at_the_start_every_pair_weighs_one_half():
    t = Toy(Groups.contiguous(3, 2))
    start = t.points(ref=t.xt @ t.policy.detach())
    assert torch.equal(DiffusionDPO().weights(start), torch.full((6,), 0.5).double())
