"""What the mathematics of AWM says, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dgpo.algorithms import AWM
from dgpo.algorithms.awm import matching_logp
from dgpo.algorithms.surrogate import clipped_surrogate, stopped_by_clip
from dgpo.core import FlowMatching, Groups, Level
from oracles.toy import LEVEL, Toy

CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def on_policy(t: Toy) -> dict[str, torch.Tensor]:
    return {"old": t.xt @ t.policy.detach()}


@pytest.mark.parametrize("power", [0.25, 1.0])
def test_at_the_policy_of_the_rollouts_it_is_the_policy_gradient(power):
    t = Toy(Groups.contiguous(3, 4))
    loss, _ = AWM(power=power, kl=0).loss(t.points(**on_policy(t)))
    error, _ = t.errors()
    logp = matching_logp(error, LEVEL.sigma, power)
    expected = t.gradient((-t.advantages * logp).mean())
    torch.testing.assert_close(t.gradient(loss), expected, **CLOSE)
    error, _ = t.errors()
    weights = (t.advantages * LEVEL.sigma * (error + 1e-10) ** (power - 1)).detach()
    torch.testing.assert_close(t.gradient((weights * error).mean()), expected, **CLOSE)


def test_power_one_is_the_plain_difference_of_losses():
    t = Toy(Groups.contiguous(3, 4))
    points = t.points()
    error, old = points.error(points.pred), points.error(points.old)
    logp = matching_logp(error, 0.7, 1.0)
    torch.testing.assert_close(logp, -0.7 * error, **CLOSE)
    _, metrics = AWM(power=1.0, kl=0).loss(points)
    ratio = (-0.7 * (error - old)).exp().mean()
    torch.testing.assert_close(metrics["ratio"], ratio.detach(), **CLOSE)


def test_small_powers_approach_the_logarithm():
    """(d^p - f^p)/p tends to log(d/f), whose gradient 1/d weighs every relative change alike."""
    error = torch.tensor([1e-3, 0.1, 2.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(matching_logp(error, 1.0, 1e-6).sum(), error)
    torch.testing.assert_close(slope * error.detach(), -torch.ones_like(slope), rtol=1e-4, atol=0)


def test_a_perfect_prediction_has_logp_zero_and_a_finite_slope():
    error = torch.zeros(1, requires_grad=True)  # float32: 1e-10 must not vanish
    logp = matching_logp(error, 0.7, 0.25)
    assert logp.detach() == 0
    assert torch.autograd.grad(logp.sum(), error)[0].isfinite()


def test_the_clip_stops_samples_that_moved_far_in_their_own_direction():
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.0], dtype=torch.float64)
    values = [1.3, 1.1, 0.5, 0.7, 0.9, 1.5, 1.5]
    ratio = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    terms = clipped_surrogate(ratio, advantages, 0.2)
    (slope,) = torch.autograd.grad(terms.sum(), ratio)
    assert slope.tolist() == [0, -1, -1, 0, 1, 1, 0]
    assert terms.tolist() == pytest.approx([-1.2, -1.1, -0.5, 0.8, 0.9, 1.5, 0])
    assert torch.equal(clipped_surrogate(ratio, advantages, None), -advantages * ratio)
    # what is counted as clipped is what has no gradient, and no more
    has_a_side = advantages != 0
    stopped = stopped_by_clip(ratio.detach(), advantages, 0.2).bool()
    assert torch.equal(stopped[has_a_side], slope[has_a_side] == 0)


def test_the_noise_level_of_an_inverted_schedule_is_its_complement():
    t = Toy(Groups.contiguous(3, 4))
    points = t.points()
    inverted = replace(
        points, process=FlowMatching(inverted=True), level=Level(LEVEL.timestep, 1 - LEVEL.sigma)
    )
    ours, theirs = (AWM(kl=0).loss(p)[1]["ratio"] for p in (points, inverted))
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_advantages_are_clamped_then_scaled():
    groups = Groups.contiguous(1, 50)
    rewards = torch.zeros(50, dtype=torch.float64)
    rewards[0] = 1.0  # 7 deviations above the mean
    assert AWM(advantage_std="group").advantages(rewards, groups)[0] == 1.0
    one = AWM(advantage_std="group", advantage_scale=1.0)
    assert one.advantages(rewards, groups)[0] == 5.0
