"""What every policy gradient on trajectories owes, and what each one adds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.table import TRAJECTORY
from dgpo.algorithms import DDPO, FlowDPPO, FlowGRPO, GRPOGuard, TrajectoryAlgorithm
from dgpo.algorithms.policy_gradient import PolicyGradient
from dgpo.core import FlowSDE, Groups, Moments, StepWindow, Trajectory
from dgpo.errors import UserError
from dgpo.registry import ALGORITHMS, resolve
from oracles.toy_trajectory import Steps

CLOSE = {"rtol": 1e-10, "atol": 1e-13}
FREE: dict[str, Any] = {"kl": 0.0}
every = pytest.mark.parametrize("algorithm", TRAJECTORY.values(), ids=TRAJECTORY)


def free(algorithm: PolicyGradient) -> PolicyGradient:
    """Without the KL term."""
    return type(algorithm)(**{**dict(algorithm), "kl": 0.0})


def steps(algorithm: TrajectoryAlgorithm, moved: float = 0.0) -> Steps:
    return Steps(algorithm, Groups.contiguous(3, 4), moved)


def test_every_registered_algorithm_has_a_row_and_is_documented() -> None:
    kinds = [resolve("algorithm", name) for name in ALGORITHMS]
    assert {kind for kind in kinds if kind.points == "trajectory"} == set(
        map(type, TRAJECTORY.values())
    )
    text = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    for algorithm in TRAJECTORY.values():
        for name in (algorithm.name, *type(algorithm).model_fields):
            assert f"`{name}`" in text or f"`{name}:" in text


@every
def test_no_advantage_no_gradient(algorithm: PolicyGradient) -> None:
    algorithm = free(algorithm)
    s = steps(algorithm, 0.1)
    loss, _ = algorithm.loss(s.points(advantages=torch.zeros(12).double()))
    assert torch.equal(s.gradient(loss), torch.zeros_like(s.policy))


@every
def test_on_policy_the_ratio_is_one_and_the_gradient_the_policys(algorithm: PolicyGradient) -> None:
    """-A grad log p; GRPO-Guard's in its own units."""
    algorithm = free(algorithm)
    s = steps(algorithm)
    points = s.points()
    loss, metrics = algorithm.loss(points)
    assert metrics["ratio"] == 1 and metrics["clipped"] == 0
    now = points.moments(points.pred)
    unit = now.std / points.duration if isinstance(algorithm, GRPOGuard) else 1.0
    torch.testing.assert_close(loss, -unit * s.advantages.mean(), rtol=0, atol=1e-12)
    expected = -unit * (s.advantages * points.log_prob(now)).mean()
    torch.testing.assert_close(s.gradient(loss), s.gradient(expected), **CLOSE)


@every
def test_the_order_of_samples_changes_nothing(algorithm: PolicyGradient) -> None:
    s = steps(algorithm, 0.05)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    loss, _ = algorithm.loss(s.points())
    other, _ = algorithm.loss(s.points(order))
    torch.testing.assert_close(other, loss, **CLOSE)
    torch.testing.assert_close(s.gradient(other), s.gradient(loss), **CLOSE)


@every
def test_micro_batches_and_processes_add_up(algorithm: PolicyGradient) -> None:
    """Parts weighted with their sizes, whether or not they hold whole groups."""
    s = steps(algorithm, 0.05)
    loss, metrics = algorithm.loss(s.points())
    parts = [algorithm.loss(s.points(rows)) for rows in torch.arange(12).split([5, 3, 4])]
    added = sum(n / 12 * part for n, (part, _) in zip((5, 3, 4), parts, strict=True))
    torch.testing.assert_close(s.gradient(torch.as_tensor(added)), s.gradient(loss), **CLOSE)
    for name, value in metrics.items():
        total = sum(n / 12 * part[name] for n, (_, part) in zip((5, 3, 4), parts, strict=True))
        torch.testing.assert_close(total, value, **CLOSE)


@every
def test_kl_is_added_with_its_weight(algorithm: PolicyGradient) -> None:
    s = steps(algorithm, 0.05)
    points = s.points()
    now, reference = points.moments(points.pred), points.moments(points.reference())
    kl = ((now.mean - reference.mean) ** 2).mean() / (2 * now.rate**2)
    loss, metrics = algorithm.loss(points)
    torch.testing.assert_close(metrics["kl"], kl.detach(), **CLOSE)
    torch.testing.assert_close(loss, free(algorithm).loss(points)[0] + algorithm.kl * kl, **CLOSE)


@every
def test_only_what_is_declared_is_read_and_gradients_reach_the_policy_alone(
    algorithm: PolicyGradient,
) -> None:
    s = steps(algorithm, 0.05)
    assert algorithm.snapshots == {"ref"} and free(algorithm).snapshots == frozenset()
    assert free(algorithm).loss(s.points(ref=None))[0].isfinite()
    with pytest.raises(ValueError, match="'ref'"):
        algorithm.loss(s.points(ref=None))
    ref, old = (s.xt @ s.ref).requires_grad_(), (s.xt @ s.old).requires_grad_()
    loss, metrics = algorithm.loss(replace(s.points(ref=ref), old=old))
    assert torch.autograd.grad(loss, (ref, old), allow_unused=True) == (None, None)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


def one(algorithm: PolicyGradient, moved: float) -> Steps:
    return Steps(algorithm, Groups.contiguous(1, 2), moved)


@pytest.mark.parametrize("make", [FlowGRPO, GRPOGuard])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_clip_stops_samples_that_moved_in_their_own_direction(make: Any, sign: float) -> None:
    algorithm = make(kl=0.0, clip=1e-6)
    s = one(algorithm, 0.05)
    advantages = torch.full((2,), sign, dtype=torch.float64)
    for row in range(2):
        points = s.points(torch.tensor([row]), advantages=advantages[:1])
        loss, metrics = algorithm.loss(points)
        inwards = sign * (metrics["ratio"] - 1) < 0
        assert metrics["clipped"] == (0 if inwards else 1)
        assert bool(s.gradient(loss).any()) == bool(inwards)


def test_dppo_stops_by_divergence_and_only_outwards() -> None:
    for tau, within in ((10.0, True), (1e-9, False)):
        algorithm = FlowDPPO(kl=0.0, tau=tau)
        s = one(algorithm, 0.05)
        for row in range(2):
            for sign in (1.0, -1.0):
                advantages = torch.tensor([sign], dtype=torch.float64)
                points = s.points(torch.tensor([row]), advantages=advantages)
                loss, metrics = algorithm.loss(points)
                assert (metrics["divergence"] < tau) == within
                inwards = sign * (metrics["ratio"] - 1) < 0
                goes_on = within or bool(inwards)
                assert metrics["clipped"] == (0 if goes_on else 1)
                assert bool(s.gradient(loss).any()) == goes_on
                torch.testing.assert_close(loss.detach(), -sign * metrics["ratio"], **CLOSE)


def guard_log_ratio(points: Trajectory) -> Tensor:
    seen: list[Tensor] = []

    class Spy(GRPOGuard):
        def surrogate(
            self, points: Trajectory, now: Moments, old: Moments, advantages: Tensor
        ) -> tuple[Tensor, dict[str, Tensor]]:
            terms, metrics = super().surrogate(points, now, old, advantages)
            seen.append(metrics["ratio"].log().detach())
            return terms, metrics

    Spy().loss(points)
    return seen[0]


def test_guard_centres_the_log_ratio() -> None:
    """Steps with noise z and -z: under the old policy the mean is 0, Flow-GRPO's is -b."""
    s = steps(GRPOGuard(), 0.3)
    assert torch.equal(guard_log_ratio(steps(GRPOGuard()).points()), torch.zeros(12).double())
    old = s.points().moments(s.points().old)
    pair = [s.points(xnext=old.mean + sign * old.std * s.z) for sign in (1, -1)]
    centred = sum(guard_log_ratio(points) for points in pair)
    torch.testing.assert_close(centred, torch.zeros(12).double(), rtol=0, atol=1e-12)
    now = s.points().moments(s.points().pred)
    raw = sum(points.log_prob(now) - points.log_prob(old) for points in pair) / 2
    torch.testing.assert_close(raw, -now.kl(old), **CLOSE)
    # and its size is that of mean(z (mu - mu_old)), whatever the std of the step
    expected = (s.z * (now.mean - old.mean)).mean((1, 2)).detach()
    torch.testing.assert_close(guard_log_ratio(pair[0]), expected, **CLOSE)


def test_guard_has_the_gradient_of_the_centred_ratio() -> None:
    """Away from the old policy b has a gradient too: r = exp(mean z (mu - mu_old))."""
    s = steps(GRPOGuard(), 0.05)
    points = s.points()
    loss, metrics = GRPOGuard(kl=0.0, clip=0.9).loss(points)
    assert metrics["clipped"] == 0 and metrics["ratio"] != 1
    now, old = points.moments(points.pred), points.moments(points.old)
    ratio = (s.z * (now.mean - old.mean)).mean((1, 2)).exp()
    expected = (-s.advantages * ratio).mean() / points.duration
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(s.gradient(loss), s.gradient(expected), **CLOSE)


def test_settings_are_the_published_ones() -> None:
    flow = FlowGRPO()
    assert (flow.clip, flow.kl, flow.sde, flow.updates) == (1e-4, 0.04, FlowSDE(), 2)
    assert flow.window is None and flow.noisy_steps(10, 0, 0) == range(9)
    assert (FlowDPPO().tau, DDPO().kl, DDPO().sde.model_dump()["eta"]) == (1e-5, 0.0, 1.0)
    fast = FlowGRPO(window=StepWindow(size=2, mode="sliding", every=5))
    assert fast.noisy_steps(10, 12, 0) == range(2, 4)
    for algorithm in TRAJECTORY.values():
        assert type(algorithm).model_validate(algorithm.model_dump(mode="json")) == algorithm
        assert all(field.description for field in type(algorithm).model_fields.values())


@pytest.mark.parametrize(
    ("kind", "wrong", "words"),
    [
        (FlowGRPO, {"sde": {"kind": "ddim"}}, "flow_grpo takes flow, dance, cps"),
        (GRPOGuard, {"sde": {"kind": "cps"}}, "grpo_guard takes flow, dance"),
        (DDPO, {"sde": {"kind": "flow"}}, "ddpo takes ddim"),
        (FlowGRPO, {"sde": {"kind": "ode"}}, "flow, dance, cps or ddim"),
        (FlowGRPO, {"clip": 0}, "clip"),
        (FlowDPPO, {"clip": 0.1}, "clip"),
        (FlowGRPO, {"updates": 0}, "updates"),
        (FlowGRPO, {"timesteps": {"count": 1}}, "timesteps"),
    ],
)
def test_wrong_settings_are_refused(kind: Any, wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        kind(**wrong)
