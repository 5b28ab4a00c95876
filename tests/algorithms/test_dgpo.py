"""DGPO's switches: clip, KL, EMA reference, advantages, precision, settings."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from dgpo.algorithms import DGPO
from dgpo.algorithms.dgpo import clip_where_done
from dgpo.core import FlowMatching, Groups, Level, TimestepChoice
from dgpo.errors import UserError
from oracles.toy import Toy

CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def test_clip_stops_samples_that_moved_far_in_their_own_direction():
    clip = 0.1
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.0])
    ratio = torch.tensor([1.2, 1.05, 0.5, 0.8, 0.95, 1.5, 0.8], dtype=torch.float64)
    error = (1.0 - ratio.log()).requires_grad_()  # d_old = 1
    clipped, done = clip_where_done(error, torch.ones(7).double(), advantages, clip)
    assert done.tolist() == [True, False, False, True, False, False, True]
    assert torch.equal(clipped, error)
    (gradient,) = torch.autograd.grad(clipped.sum(), error)
    assert torch.equal(gradient, (~done).double())


def test_clipped_samples_stay_in_the_margin():
    t = Toy(Groups.contiguous(3, 4))
    free, clipped = DGPO(beta=7, kl=0, clip=None), DGPO(beta=7, kl=0, clip=1e-3)
    points = t.points()
    assert torch.equal(free.weights(points), clipped.weights(points))
    _, metrics = clipped.loss(points)
    error = points.error(points.pred)
    ratio = (points.error(points.old) - error).exp()
    done = torch.where(t.advantages > 0, ratio > 1 + 1e-3, ratio < 1 - 1e-3)
    assert 0 < done.sum() < 12 and metrics["clipped"] == done.double().mean()
    kept = torch.where(done, 0, free.weights(points) * t.advantages)
    expected = t.gradient((kept * error).mean())
    torch.testing.assert_close(t.gradient(clipped.loss(t.points())[0]), expected, **CLOSE)
    # the sprung variant: clipped samples left out of S_g
    outside = torch.where(done, 0, t.advantages)
    sprung = free.weights(t.points(advantages=outside))
    assert (sprung - free.weights(points)).abs().max() > 0.01


def test_clip_ranges_of_1e_5_are_resolved_in_float32():
    """Trap 6: in bfloat16 both samples would look alike."""
    old = torch.tensor([0.5, 0.5])
    error = torch.tensor([0.5 - 1.5e-5, 0.5 - 0.5e-5])
    _, done = clip_where_done(error, old, torch.ones(2), 1e-5)
    assert done.tolist() == [True, False]
    half = (old.bfloat16() - error.bfloat16()).exp() > 1 + 1e-5
    assert half.tolist() == [False, False]


def test_bfloat16_predictions_are_widened_before_they_are_squared():
    """Trap 6 for the whole chain x0 -> xt, target -> d."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, out = (torch.randn(4, 3, 8, 8, generator=generator).bfloat16() for _ in range(3))
    level, process = Level(torch.tensor(700.0), 0.7), FlowMatching()
    xt, target = process.corrupt(x0, noise, level), process.target(x0, noise, level)
    t = Toy(Groups.contiguous(2, 2))
    points = t.points()
    fields = {"x0": x0, "noise": noise, "xt": xt, "target": target, "pred": out}
    points = type(points)(**{**vars(points), **fields, "ref": out, "old": out})
    assert xt.dtype == target.dtype == points.error(out).dtype == torch.float32
    exact = (out.double() - (noise.double() - x0.double())).square().mean((1, 2, 3))
    assert (points.error(out) - exact).abs().max() < 1e-5
    sprung = (out - (noise - x0)).square().mean((1, 2, 3))
    assert (sprung - exact).abs().max() > 1e-4
    loss, metrics = DGPO().loss(points)
    assert loss.dtype == torch.float32 and metrics["margin"] == 0


@pytest.mark.parametrize("clip", [None, 1e-5])
def test_ema_reference_takes_the_old_policy_as_baseline(clip):
    """Trap 9: also with the clip off."""
    t = Toy(Groups.contiguous(3, 4))
    algorithm = DGPO(beta=7, kl=0, clip=clip, reference="ema")
    assert algorithm.snapshots == {"old"}
    points = t.points(ref=None)
    frozen = DGPO(beta=7, kl=0, clip=clip).weights(t.points(ref=points.old, old=None))
    assert torch.equal(algorithm.weights(points), frozen)
    # the sprung variant keeps the frozen reference
    assert (DGPO(beta=7).weights(t.points()) - frozen).abs().max() > 0.01
    algorithm.loss(points)
    with pytest.raises(ValueError, match="'old'"):
        algorithm.loss(t.points(ref=None, old=None))


def test_ema_reference_keeps_the_kl_with_the_frozen_base():
    t = Toy(Groups.contiguous(3, 4))
    algorithm = DGPO(kl=0.5, clip=None, reference="ema")
    assert algorithm.snapshots == {"ref", "old"}
    points = t.points()
    expected = (points.pred - points.ref).square().mean()
    torch.testing.assert_close(algorithm.loss(points)[1]["kl"], expected.detach(), **CLOSE)


def test_kl_is_added_with_its_weight_and_its_own_guided_reference():
    t = Toy(Groups.contiguous(3, 4))
    guided = t.xt @ (t.ref + 1)
    with_kl, without = DGPO(kl=0.5, kl_cfg=4.5, baseline="plain"), DGPO(kl=0)
    assert with_kl.kl_guidance == 4.5 and without.kl_guidance is None
    assert DGPO(kl=0, kl_cfg=4.5, baseline="plain").kl_guidance is None
    points = t.points(kl_ref=guided)
    expected = without.loss(points)[0] + 0.5 * (points.pred - guided).square().mean()
    torch.testing.assert_close(with_kl.loss(points)[0], expected, **CLOSE)
    assert torch.equal(with_kl.weights(points), without.weights(points))  # S_g has no guidance
    with pytest.raises(ValueError, match="kl_ref"):
        with_kl.loss(t.points())


def test_one_guided_reference_serves_the_margin_and_the_kl_term():
    t = Toy(Groups.contiguous(3, 4))
    guided = t.xt @ (t.ref + 1)
    algorithm = DGPO(beta=7, kl=0.5, kl_cfg=4.5)
    assert algorithm.snapshots == {"old"} and algorithm.kl_guidance == 4.5
    points = t.points(ref=None, kl_ref=guided)
    margin = DGPO(beta=7).weights(t.points(ref=guided))  # as if the guided one were the reference
    assert torch.equal(algorithm.weights(points), margin)
    kl = (points.pred - guided).square().mean()
    torch.testing.assert_close(algorithm.loss(points)[1]["kl"], kl.detach(), **CLOSE)
    plain = DGPO(beta=7, kl=0.5, kl_cfg=4.5, baseline="plain")
    assert plain.snapshots == {"ref", "old"} and plain.kl_guidance == 4.5
    assert (plain.weights(t.points(kl_ref=guided)) - margin).abs().max() > 0.01
    # without a KL term the margin is guided all the same; without guidance there is one reference
    assert DGPO(kl=0, kl_cfg=4.5).kl_guidance == 4.5
    assert DGPO(kl_cfg=1).snapshots == DGPO(kl_cfg=1, baseline="plain").snapshots == {"ref", "old"}


@pytest.mark.parametrize(
    ("settings", "trained"), [({}, True), ({"kl": 0}, False), ({"equal_groups": "skip"}, False)]
)
def test_groups_of_equal_rewards_are_trained_for_their_kl_term(settings, trained):
    assert DGPO(**settings).trains_equal_groups is trained


def test_gradients_reach_the_policy_alone():
    t = Toy(Groups.contiguous(3, 4))
    others = [value.clone().requires_grad_() for value in (t.ref, t.old)]
    points = t.points(ref=t.xt @ others[0], old=t.xt @ others[1])
    loss, metrics = DGPO(kl=0.5, loss_scale="paper").loss(points)
    assert torch.autograd.grad(loss, others, allow_unused=True, retain_graph=True) == (None, None)
    assert t.gradient(loss).abs().max() > 0
    assert set(metrics) == {"error", "weight", "margin", "clipped", "kl"}
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


def test_only_declared_snapshots_are_read():
    t = Toy(Groups.contiguous(3, 4))
    for algorithm in (
        DGPO(),
        DGPO(clip=None),
        DGPO(kl_cfg=4.5),
        DGPO(kl_cfg=4.5, baseline="plain"),
        DGPO(reference="ema"),
        DGPO(reference="ema", kl=0, clip=None),
        DGPO(reference="ema", kl_cfg=4.5),
    ):
        missing = dict.fromkeys({"ref", "old"} - algorithm.snapshots)
        kl_ref = None if algorithm.kl_guidance is None else t.xt @ t.ref
        loss, _ = algorithm.loss(t.points(kl_ref=kl_ref, **missing))
        assert loss.isfinite()
    assert DGPO(reference="ema", kl_cfg=4.5).snapshots == {"old"}


def test_advantages_are_normalised_and_clamped():
    groups = Groups.contiguous(2, 50)
    rewards = torch.zeros(100, dtype=torch.float64)
    rewards[0] = 1.0
    rewards[50:] = torch.arange(50) % 2
    group = DGPO().advantages(rewards, groups)
    assert group[0] == 5.0 and group.abs().max() == 5.0  # (1 - 0.02) / 0.14 = 7 without the clamp
    within = (rewards - groups.each(groups.mean(rewards))).square().mean().sqrt()
    torch.testing.assert_close(group[51], 0.5 / (0.5 + 1e-4 * within), **CLOSE)
    batch = DGPO(advantage_std="batch").advantages(rewards, groups)
    std = rewards.std(unbiased=False) + 1e-4 * within
    torch.testing.assert_close(batch[51], 0.5 / std, **CLOSE)
    torch.testing.assert_close(batch[1], -0.02 / std, **CLOSE)


def test_one_prompt_drawn_twice_makes_two_groups():
    """Trap 3: groups are numbers, not texts."""
    prompts = ["a cat"] * 4
    rewards = torch.tensor([0.0, 1.0, 10.0, 11.0])
    ours = DGPO().advantages(rewards, Groups.contiguous(2, 2))
    texts = sorted(set(prompts))
    merged = Groups(torch.tensor([texts.index(p) for p in prompts]), 4, 1)
    sprung = DGPO().advantages(rewards, merged)
    torch.testing.assert_close(ours.sign(), torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    assert (ours.sign() != sprung.sign()).any()


def test_settings_are_the_published_ones_and_frozen():
    algorithm = DGPO()
    assert algorithm.timesteps == TimestepChoice(count=4, indices=(0, 6))
    assert (algorithm.beta, algorithm.clip, algorithm.kl) == (100, 1e-2, 0.02)
    assert algorithm.shared_noise and algorithm.name == "dgpo"
    with pytest.raises(ValidationError):
        algorithm.beta = 3
    assert DGPO.model_validate(algorithm.model_dump()) == algorithm
    assert all(field.description for field in DGPO.model_fields.values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta": 0},
        {"beta": float("nan")},
        {"clip": 0},
        {"kl": -1},
        {"kl_cfg": 0.5},
        {"loss_scale": "none"},
        {"reference": "old"},
        {"baseline": "ema"},
        {"equal_groups": "keep"},
        {"advantage_std": "global"},
        {"old_decay_max": 1},
        {"betta": 1},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        DGPO(**wrong)


def test_uniform_weights_sum_to_zero_and_forget_the_size_of_the_advantage() -> None:
    groups = Groups.contiguous(3, 4)
    rewards = torch.tensor([0.0, 0.1, 0.2, 9.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]).double()
    made = DGPO(sample_weights="uniform").advantages(rewards, groups)
    # one of four is above the mean: 4 / (2 * 1) for it, -4 / (2 * 3) for each of the others
    wanted = [-2 / 3, -2 / 3, -2 / 3, 2, 0, 0, 0, 0, -1, -1, 1, 1]
    torch.testing.assert_close(made, torch.tensor(wanted).double())
    assert groups.sum(made).abs().max() < 1e-12  # so that log Z cancels
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = Groups(groups.index[order], 4, 3)
    other = DGPO(sample_weights="uniform", advantage_std="batch").advantages(rewards[order], mixed)
    torch.testing.assert_close(other, made[order])
    pairs = DGPO(sample_weights="uniform").advantages(rewards[:4], Groups.contiguous(2, 2))
    assert pairs.tolist() == [-1, 1, -1, 1]  # those of Diffusion-DPO
