"""What the mathematics of CRD says, in float64."""

from __future__ import annotations

import pytest
import torch

from dgpo.algorithms import CRD
from dgpo.algorithms.crd import centred_residual, crd_loss
from dgpo.core import Groups
from oracles.toy import Toy

CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def toy() -> Toy:
    """Groups in mixed order."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    return Toy(Groups(Groups.contiguous(3, 4).index[order], 4, 3))


def by_groups(t: Toy, detach_means: bool = False) -> torch.Tensor:
    """The centred squared error, written out group by group; autograd goes through the means."""
    error, _ = t.errors()
    reward = (t.xt @ t.old - t.target).square().mean((1, 2)) - error
    wanted = t.advantages / 10 + 0.5
    total = torch.zeros((), dtype=torch.float64)
    for g in range(t.groups.count):
        mine, theirs = reward[t.groups.index == g], wanted[t.groups.index == g]
        mean = mine.mean().detach() if detach_means else mine.mean()
        total = total + (mine - mean - (theirs - theirs.mean())).square().sum()
    return total / len(error)


@pytest.mark.parametrize("detach_means", [False, True])
def test_the_linear_form_is_the_autograd_of_the_centred_error(detach_means):
    """Also of the one with detached means: residuals that sum to zero cancel them."""
    t = toy()
    loss, _ = CRD(kl=0).loss(t.points())
    expected = by_groups(t, detach_means)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(t.gradient(loss), t.gradient(expected), **CLOSE)


def test_residuals_of_a_group_sum_to_zero():
    t = toy()
    residual = CRD().weights(t.points())
    assert residual.abs().max() > 0.01 and not residual.requires_grad
    assert t.groups.sum(residual).abs().max() < 1e-14


def test_a_reward_that_is_matched_has_no_gradient():
    t = toy()
    points = t.points()
    reward = (points.error(points.old) - points.error(points.pred)).detach()
    # A/10 is the implicit reward, up to a constant for each group
    shift = t.groups.each(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    matched = t.points(advantages=10 * reward + shift)
    loss, metrics = CRD(kl=0).loss(matched)
    assert metrics["residual"] < 1e-14 and loss.detach() < 1e-28
    assert t.gradient(loss).abs().max() < 1e-13
    exact = crd_loss(reward.requires_grad_(), torch.zeros(12, dtype=torch.float64))
    assert torch.equal(torch.autograd.grad(exact, reward)[0], torch.zeros(12).double())


def test_at_the_old_policy_it_is_an_advantage_weighted_loss():
    """e = -A/10, so the gradient is mean_i (A_i/5) grad d_i."""
    t = toy()
    loss, _ = CRD(kl=0).loss(t.points(old=t.xt @ t.policy.detach()))
    expected = (t.advantages / 5 * t.errors()[0]).mean()
    torch.testing.assert_close(t.gradient(loss), t.gradient(expected), **CLOSE)


def test_a_part_of_a_group_is_not_centred():
    t = toy()
    rows = torch.arange(5)
    with pytest.raises(ValueError, match=r"of its 4 samples.*Forward\.weights"):
        CRD().loss(t.points(rows, t.groups.subset(rows)))
    # the sprung variant: centred with what is at hand
    reward = torch.randn(12, generator=torch.Generator().manual_seed(1)).double()
    whole = centred_residual(reward, t.advantages, t.groups)
    gap = (reward - t.advantages)[:5]
    assert (gap - gap.mean() - whole[:5]).abs().max() > 0.01


def test_kl_is_that_with_the_guided_reference():
    t = toy()
    guided, without = CRD(kl=0.5), CRD(kl=0)
    assert guided.kl_guidance == 4.5 and without.kl_guidance is None
    assert guided.snapshots == {"old"} and CRD(kl_cfg=1).snapshots == {"old", "ref"}
    points = t.points(kl_ref=t.xt @ (t.ref + 1), ref=None)
    expected = (points.pred - points.kl_ref).square().mean()
    torch.testing.assert_close(
        guided.loss(points)[0], without.loss(points)[0] + 0.5 * expected, **CLOSE
    )


def test_the_old_policy_lags_more_and_more():
    decays = [CRD().old_decay(n) for n in (0, 10, 1000)]
    assert decays == pytest.approx([0.25, 0.3, 0.999])
