"""What the mathematics of DGPO says, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid

from dgpo.algorithms import DGPO
from dgpo.algorithms.dgpo import dgpo_loss, group_margin
from dgpo.core import Groups
from oracles.toy import Toy, run_processes

CLOSE = {"rtol": 1e-11, "atol": 1e-13}
SCALES = ["reference", "paper"]


def toy(count: int = 3, size: int = 4, seed: int = 0) -> Toy:
    """Groups in mixed order."""
    order = torch.randperm(count * size, generator=torch.Generator().manual_seed(seed))
    return Toy(Groups(Groups.contiguous(count, size).index[order], size, count), seed)


def by_groups(t: Toy, beta: float) -> torch.Tensor:
    """-log sigmoid(-S_g), one a group, written out with loops."""
    error, ref_error = t.errors()
    losses = []
    for g in range(t.groups.count):
        members = (t.groups.index == g).nonzero()[:, 0].tolist()
        s = beta / t.groups.size * sum(t.advantages[i] * (error[i] - ref_error[i]) for i in members)
        losses.append(-logsigmoid(-s))
    return torch.stack(losses)


def test_at_the_start_the_margin_is_zero_and_every_weight_one_half():
    t = toy()
    start = t.points(ref=t.xt @ t.policy.detach())
    assert torch.equal(DGPO(clip=None).weights(start), torch.full((12,), 0.5, dtype=torch.float64))
    loss, metrics = DGPO(clip=None, kl=0, loss_scale="paper").loss(start)
    assert metrics["margin"] == 0 and metrics["weight"] == 0.5
    torch.testing.assert_close(loss, torch.tensor(2.0, dtype=torch.float64).log(), **CLOSE)


def test_a_pair_is_diffusion_dpo():
    t = Toy(Groups.contiguous(3, 2))
    t.advantages = torch.tensor([1.0, -1, 1, -1, 1, -1], dtype=torch.float64)
    error, ref_error = t.errors()
    better, worse = slice(0, None, 2), slice(1, None, 2)
    inner = (error[better] - ref_error[better]) - (error[worse] - ref_error[worse])
    dpo = -logsigmoid(-(7.0 / 2) * inner).mean()
    loss, _ = DGPO(beta=7, clip=None, kl=0, loss_scale="paper").loss(t.points())
    torch.testing.assert_close(loss, dpo, **CLOSE)
    torch.testing.assert_close(t.gradient(loss), t.gradient(dpo), **CLOSE)


def test_paper_scale_is_the_autograd_of_the_group_loss():
    t = toy()
    expected = by_groups(t, 7.0).mean()
    loss, metrics = DGPO(beta=7, clip=None, kl=0, loss_scale="paper").loss(t.points())
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(t.gradient(loss), t.gradient(expected), **CLOSE)
    assert not metrics["margin"].requires_grad


def test_gradient_of_the_group_loss_in_closed_form():
    """autograd of -log sigmoid(-S) = (beta/G) sigmoid(S) sum_i A_i grad d_i, group by group."""
    t, beta = toy(), 7.0
    margin = group_margin(*t.errors(), t.advantages, t.groups, beta)
    assert not margin.requires_grad and margin.abs().max() > 0.1
    for g in range(t.groups.count):
        weighted = (t.advantages * t.errors()[0])[t.groups.index == g].sum()
        closed = beta / t.groups.size * margin[g].sigmoid() * t.gradient(weighted)
        torch.testing.assert_close(t.gradient(by_groups(t, beta)[g]), closed, **CLOSE)


def test_reference_scale_is_the_paper_gradient_without_beta():
    t = toy()
    reference, _ = DGPO(beta=7, kl=0).loss(t.points())
    paper, _ = DGPO(beta=7, kl=0, loss_scale="paper").loss(t.points())
    torch.testing.assert_close(7 * t.gradient(reference), t.gradient(paper), **CLOSE)


def test_the_sign_weighs_groups_that_are_worse_than_the_reference_more():
    """Trap 1: the weight of a minimised loss is sigmoid(+S)."""
    t = toy()
    error, ref_error = t.errors()
    margin = group_margin(error, ref_error, t.advantages, t.groups, 7.0)
    weights = DGPO(beta=7).weights(t.points())
    assert torch.equal(weights > 0.5, t.groups.each(margin) > 0)
    true = t.gradient(by_groups(t, 7.0).mean() / 7)
    right = t.gradient(dgpo_loss(t.errors()[0], t.advantages, weights, None))
    sprung = t.gradient(dgpo_loss(t.errors()[0], t.advantages, 1 - weights, None))
    torch.testing.assert_close(right, true, **CLOSE)
    assert (sprung - true).abs().max() > 0.1 * true.abs().max()


def test_minimising_prefers_the_better_samples():
    t = toy()
    error, _ = t.errors()
    loss, _ = DGPO(clip=None, kl=0).loss(t.points())
    with torch.no_grad():
        t.policy -= 1e-3 * t.gradient(loss)
    moved = (t.errors()[0] - error).detach()
    assert (t.advantages * moved).sum() < 0


@pytest.mark.parametrize("scale", SCALES)
def test_order_of_samples_and_numbers_of_groups_change_nothing(scale):
    t = toy()
    algorithm = DGPO(beta=7, clip=1e-3, loss_scale=scale)
    whole, _ = algorithm.loss(t.points())
    rows = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    renamed = Groups(torch.tensor([2, 0, 1])[t.groups.index[rows]], 4, 3)
    permuted, _ = algorithm.loss(t.points(rows, renamed))
    torch.testing.assert_close(permuted, whole, **CLOSE)
    torch.testing.assert_close(t.gradient(permuted), t.gradient(whole), **CLOSE)


def accumulate(t: Toy, algorithm: DGPO, parts, weights):
    """What the trainer does: micro-batch losses averaged by size."""
    total = torch.zeros_like(t.policy)
    for rows in parts:
        groups = t.groups.subset(rows)
        part = None if weights is None else weights[rows]
        loss, _ = algorithm.loss(t.points(rows, groups, part))
        total += len(rows) / len(t.x0) * t.gradient(loss)
    return total


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [2, 3, 6, 1]])
def test_micro_batches_that_cut_groups_are_exact(scale, sizes):
    t = toy()
    algorithm = DGPO(beta=7, clip=1e-3, kl=0.3, loss_scale=scale)
    whole = t.gradient(algorithm.loss(t.points())[0])
    with torch.no_grad():
        weights = algorithm.weights(t.points())
    parts = torch.arange(12).split(sizes)
    assert not weights.requires_grad
    torch.testing.assert_close(accumulate(t, algorithm, parts, weights), whole, **CLOSE)


@pytest.mark.parametrize("scale", SCALES)
def test_micro_batches_of_whole_groups_need_no_weights(scale):
    t = toy()
    algorithm = DGPO(beta=7, loss_scale=scale)
    whole = t.gradient(algorithm.loss(t.points())[0])
    parts = [(t.groups.index < 2).nonzero()[:, 0], (t.groups.index == 2).nonzero()[:, 0]]
    torch.testing.assert_close(accumulate(t, algorithm, parts, None), whole, **CLOSE)


def test_a_margin_of_a_part_of_a_group_is_refused_because_it_would_differ():
    t = toy()
    algorithm = DGPO(beta=7, kl=0)
    rows = torch.arange(5)
    with pytest.raises(ValueError, match=r"of its 4 samples.*Forward\.weights"):
        algorithm.loss(t.points(rows, t.groups.subset(rows)))
    # the sprung variant: sums over what is at hand
    error, ref_error = t.errors()
    sums = t.groups.sum(torch.where(torch.arange(12) < 5, t.advantages * (error - ref_error), 0))
    sprung = t.groups.each((7 / 4 * sums).sigmoid())
    assert (sprung - algorithm.weights(t.points())).abs().max() > 0.01


@pytest.mark.parametrize("scale", SCALES)
def test_two_processes_give_the_gradient_of_one(scale):
    """Trap 2: group sums are added over the processes before the sigmoid."""
    t = toy(count=3, size=4)
    algorithm = DGPO(beta=7, clip=1e-3, kl=0.3, loss_scale=scale)
    whole = t.gradient(algorithm.loss(t.points())[0])
    shares = torch.arange(12).split([5, 7])

    def body(rank, reduce, collective=True):
        rows = shares[rank]
        groups = Groups(t.groups.index[rows], 4, 3, reduce)
        points = t.points(rows, groups)
        if not collective:  # the sprung variant: each process takes the sigmoid of its own sums
            error = (points.error(points.pred) - points.error(points.ref)).detach()
            own = Groups(groups.index, 4, 3).sum(7 / 4 * points.advantages * error)
            points = t.points(rows, groups, groups.each(own.sigmoid()))
        return len(rows) / 12 * t.gradient(algorithm.loss(points)[0])

    torch.testing.assert_close(sum(run_processes(body, 2)), whole, **CLOSE)
    sprung = sum(run_processes(lambda rank, reduce: body(rank, reduce, False), 2))
    assert (sprung - whole).abs().max() > 1e-3 * whole.abs().max()


def test_a_group_without_spread_contributes_exactly_nothing():
    t = Toy(Groups.contiguous(2, 3))
    rewards = torch.tensor([0.1] * 3 + [0.3] * 3, dtype=torch.float64)
    assert float(rewards[:3].sum() / 3) != 0.1  # the mean rounds, so A = r - mean is not enough
    for std in ("group", "batch"):
        algorithm = DGPO(kl=0, advantage_std=std)
        t.advantages = algorithm.advantages(rewards, t.groups)
        assert torch.equal(t.advantages, torch.zeros(6, dtype=torch.float64))
        gradient = t.gradient(algorithm.loss(t.points())[0])
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_old_policy_is_the_policy_after_step_zero():
    algorithm = DGPO()
    assert algorithm.old_decay(0) == 0
    assert algorithm.old_decay(100) == pytest.approx(0.1)
    assert algorithm.old_decay(10_000) == 0.3
