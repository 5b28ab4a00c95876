"""What the mathematics of DiffusionNFT says, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dgpo.algorithms import DiffusionNFT
from dgpo.algorithms.diffusion_nft import implicit_predictions, scaled_error
from dgpo.core import Epsilon, FlowMatching, Forward, Groups, Level, Process, VPrediction
from oracles.toy import Toy

CLOSE = {"rtol": 1e-11, "atol": 1e-13}
TABLE = torch.linspace(0.99, 0.01, 10, dtype=torch.float64)
PROCESSES: list[tuple[Process, Level]] = [
    (FlowMatching(), Level(torch.tensor(700.0), 0.7)),
    (FlowMatching(inverted=True), Level(torch.tensor(300.0), 0.3)),
    (Epsilon(TABLE), Epsilon(TABLE).level(torch.tensor(6))),
    (VPrediction(TABLE), VPrediction(TABLE).level(torch.tensor(6))),
]
every_process = pytest.mark.parametrize(("process", "level"), PROCESSES)


def noised(t: Toy, process: Process, level: Level) -> Forward:
    points = t.points()
    xt = process.corrupt(t.x0, t.noise, level)
    target = process.target(t.x0, t.noise, level)
    changes = {"pred": xt @ t.policy, "ref": xt @ t.ref, "old": xt @ t.old}
    return replace(points, xt=xt, target=target, process=process, level=level, **changes)


def by_samples(points: Forward, beta: float, most: float, kl: float) -> Tensor:
    """The loss written out, one sample after the other."""
    total = torch.zeros((), dtype=torch.float64)
    assert points.old is not None and points.ref is not None
    for i in range(len(points.x0)):
        v, v_old, x0 = points.pred[i], points.old[i], points.x0[i]
        losses = []
        for out in (beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v):
            clean = points.process.x0(points.xt[i], out, points.level)
            scale = max(float((clean - x0).abs().mean().detach()), 1e-5)
            losses.append((clean - x0).square().mean() / scale)
        r = points.advantages[i] / (2 * most) + 0.5
        total = total + most * (r * losses[0] + (1 - r) * losses[1]) / beta
        total = total + kl * (v - points.ref[i]).square().mean()
    return total / len(points.x0)


@every_process
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_loss_and_gradient_are_those_of_the_formula(process, level, beta):
    t = Toy(Groups.contiguous(3, 4))
    loss, _ = DiffusionNFT(beta=beta, kl=0.3).loss(noised(t, process, level))
    expected = by_samples(noised(t, process, level), beta, 5.0, 0.3)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(t.gradient(loss), t.gradient(expected), **CLOSE)


@every_process
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_at_the_old_policy_the_gradient_is_advantage_weighted(process, level, beta):
    """mean_i A_i grad L_i whatever beta is: the factors b and 1/b cancel, and r - (1-r) = A/m."""
    t = Toy(Groups.contiguous(3, 4))
    points = noised(t, process, level)
    at_old = replace(points, old=points.pred.detach())
    gradient = t.gradient(DiffusionNFT(beta=beta, kl=0).loss(at_old)[0])
    points = noised(t, process, level)
    own = scaled_error(process.x0(points.xt, points.pred, level), points.x0)
    closed = (points.advantages * own).mean()
    torch.testing.assert_close(gradient, t.gradient(closed), rtol=1e-9, atol=1e-11)


def test_the_two_predictions_lie_on_both_sides_of_the_old_one():
    generator = torch.Generator().manual_seed(0)
    out, old = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    for beta in (0.1, 1.0, 2.0):
        good, bad = implicit_predictions(out, old, beta)
        torch.testing.assert_close((good + bad) / 2, old, **CLOSE)
        torch.testing.assert_close(good - old, beta * (out - old), **CLOSE)
    assert torch.equal(implicit_predictions(out, old, 1.0)[0], out)


def on_a_line(place: float, chance: float, beta: float) -> tuple[float, float]:
    """Loss and its slope where x0 is +1 (good with a chance) or -1 (good with the opposite chance),
    the old policy answers their mean 0, and the policy answers ``place``."""
    x0 = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    where = torch.tensor(place, dtype=torch.float64, requires_grad=True)
    process, level = FlowMatching(), Level(torch.tensor(500.0), 0.5)
    xt = torch.zeros_like(x0)  # the same for both: noise was -1 and +1
    advantage = 10 * (chance - 0.5)
    points = Forward(
        x0=x0,
        noise=-x0,
        xt=xt,
        target=-2 * x0,
        level=level,
        process=process,
        pred=-where.expand(2, 1) / 0.5,  # x0 = xt - 0.5 v
        ref=None,
        old=torch.zeros_like(x0),
        kl_ref=None,
        advantages=torch.tensor([advantage, -advantage], dtype=torch.float64),
        groups=Groups.contiguous(1, 2),
    )
    loss, _ = DiffusionNFT(beta=beta, kl=0).loss(points)
    return float(loss.detach()), float(torch.autograd.grad(loss, where)[0])


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("chance", [0.6, 1.0])
def test_on_two_points_the_optimum_is_the_better_one(beta, chance):
    """Errors over their own absolute value have the medians as optima: x0(v+) is the better point,
    x0(v-) the worse, and so the policy answers old + (better - old)/beta."""
    best = 1 / beta
    assert on_a_line(best - 0.1, chance, beta)[1] < 0 < on_a_line(best + 0.1, chance, beta)[1]
    losses = [on_a_line(place, chance, beta)[0] for place in (best - 0.1, best, best + 0.1)]
    assert losses[1] == min(losses)
    if chance == 1:
        assert losses[1] == pytest.approx(0, abs=1e-12)
    # between the points the slope does not depend on the place: 5 * mean of 2 * (1 - 2 chance)
    for place in (-0.5 * best, 0.0, 0.5 * best):
        assert on_a_line(place, chance, beta)[1] == pytest.approx(10 * (1 - 2 * chance))


def test_an_exact_prediction_is_not_divided_by_zero():
    x0 = torch.ones(2, 3, dtype=torch.float64)
    clean = x0.clone().requires_grad_()
    error = scaled_error(clean, x0)
    assert torch.equal(error, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(torch.autograd.grad(error.sum(), clean)[0], torch.zeros_like(x0))


def test_both_published_schedules_of_the_old_policy():
    early, late = DiffusionNFT(), DiffusionNFT(old_schedule="late")
    assert [early.old_decay(n) for n in (0, 100, 500, 2000)] == pytest.approx([0, 0.1, 0.5, 0.5])
    # two gradient steps an iteration: those after 37 iterations are the 74th, after 38 the 76th
    assert [late.old_decay(n) for n in (0, 36, 37, 300)] == pytest.approx([0, 0, 0.0075, 0.999])


def test_the_pictures_are_those_of_the_old_policy_which_rests_during_an_update():
    assert DiffusionNFT.samples_from == "old" and DiffusionNFT.old_moves == "iteration"
