"""The stochastic samplers against closed forms, torch.distributions and diffusers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.distributions import Normal

from dgpo.core import (
    CPS,
    DDIM,
    DanceSDE,
    Epsilon,
    FlowMatching,
    FlowSDE,
    Level,
    Moments,
    Sde,
    VPrediction,
)

FLOW = FlowMatching()
CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def at(sigma: float) -> Level:
    return Level(torch.tensor(1000 * sigma), sigma)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def flow_step(sde: Sde, s: float, s_next: float, x: Tensor, v: Tensor) -> Moments:
    return sde.moments(FLOW, x, v, at(s), at(s_next))


def velocity(x: Tensor, s: float, mean: float, std: float) -> Tensor:
    """E[e - x0 | x] for x0 ~ N(mean, std^2): everything is jointly Gaussian."""
    variance = (1 - s) ** 2 * std**2 + s**2
    return (s - (1 - s) * std**2) / variance * (x - (1 - s) * mean) - mean


def walk(sde: Sde | None, steps: int, mean: float, std: float, end: float) -> tuple[float, float]:
    """Mean and variance at level ``end``, from the exact Gaussian at 0.95; every step is affine in
    x and adds Gaussian noise. ``None`` for Euler."""
    sigmas = torch.linspace(0.95, end, steps + 1).double().tolist()
    m = (1 - sigmas[0]) * mean
    variance = (1 - sigmas[0]) ** 2 * std**2 + sigmas[0] ** 2
    for s, s_next in pairwise(sigmas):
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        v = velocity(x, s, mean, std)
        if sde is None:
            image, added = x + v * (s_next - s), 0.0
        else:
            moments = flow_step(sde, s, s_next, x, v)
            image, added = moments.mean, moments.std
        offset, slope = float(image[0]), float(image[1] - image[0])
        m, variance = slope * m + offset, slope**2 * variance + added**2
    return m, variance


@pytest.mark.parametrize("sde", [None, FlowSDE(), DanceSDE(noise_level=0.7)])
def test_marginals_are_those_of_the_flow(sde):
    """To first order in the step, as Euler's: half the step, half the error."""
    mean, std, end = 1.5, 0.6, 0.2
    exact = (1 - end) * mean, (1 - end) ** 2 * std**2 + end**2
    errors = []
    for steps in (200, 400, 800):
        found = walk(sde, steps, mean, std, end)
        errors.append(max(abs(a - b) for a, b in zip(found, exact, strict=True)))
    assert errors[-1] < 3e-3
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("noise_level", [0.1, 0.7, 1.0])
def test_cps_has_the_exact_marginals_where_x0_is_certain(noise_level):
    """In three steps; Flow-SDE has not."""
    mean, end = 1.5, 0.2
    m, variance = walk(CPS(noise_level=noise_level), 3, mean, 0.0, end)
    assert (m, variance) == (pytest.approx((1 - end) * mean), pytest.approx(end**2))
    assert abs(walk(FlowSDE(), 3, mean, 0.0, end)[1] - end**2) > 0.1 * end**2


def test_cps_with_little_noise_is_nearly_the_flow():
    exact = 0.8**2 * 0.36 + 0.04
    assert walk(CPS(noise_level=0.05), 800, 1.5, 0.6, 0.2)[1] == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("kind", [FlowSDE, DanceSDE])
def test_without_noise_it_is_eulers_step_bit_by_bit(kind):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    x, v = normal(2, 3, 4).float(), normal(2, 3, 4, seed=1).float()
    for i in range(4):
        s, s_next = scheduler.sigmas[i].item(), scheduler.sigmas[i + 1].item()
        euler = scheduler.step(v, scheduler.timesteps[i], x, return_dict=False)[0]
        moments = flow_step(kind(noise_level=1e-30), s, s_next, x, v)
        assert torch.equal(moments.mean, euler)
        assert moments.std < 1e-28


def test_cps_without_noise_is_eulers_step():
    x, v = normal(2, 5), normal(2, 5, seed=1)
    moments = flow_step(CPS(noise_level=1e-12), 0.7, 0.4, x, v)
    torch.testing.assert_close(moments.mean, x - 0.3 * v, **CLOSE)


def test_flow_sde_as_the_paper_writes_it():
    x, v, a, s, dt = normal(2, 5), normal(2, 5, seed=1), 0.7, 0.6, -0.1
    sd = a * math.sqrt(s / (1 - s))
    mean = x * (1 + sd**2 * dt / (2 * s)) + v * (1 + sd**2 * (1 - s) / (2 * s)) * dt
    moments = flow_step(FlowSDE(noise_level=a), s, s + dt, x, v)
    torch.testing.assert_close(moments.mean, mean, **CLOSE)
    assert moments.rate == pytest.approx(sd) and moments.std == pytest.approx(sd * 0.1**0.5)


def test_pure_noise_takes_the_next_sigma_in_the_denominator():
    x, v = normal(2, 5), normal(2, 5, seed=1)
    assert flow_step(FlowSDE(), 1.0, 0.9, x, v).rate == pytest.approx(0.7 * math.sqrt(1 / 0.1))


def test_dance_sde_as_the_paper_writes_it():
    x, v, a, s, dt = normal(2, 5), normal(2, 5, seed=1), 0.3, 0.6, -0.1
    score = -(x - (1 - s) * (x - s * v)) / s**2
    moments = flow_step(DanceSDE(), s, s + dt, x, v)
    torch.testing.assert_close(moments.mean, x + (v - a**2 / 2 * score) * dt, **CLOSE)
    assert moments.std == pytest.approx(a * math.sqrt(-dt)) and moments.rate == a


@pytest.mark.parametrize("sde", [FlowSDE(), DanceSDE()])
def test_log_prob_is_the_mean_of_torch_distributions(sde):
    x, v, value = (normal(3, 2, 4, seed=seed) for seed in range(3))
    moments = flow_step(sde, 0.6, 0.5, x, v)
    expected = Normal(moments.mean, moments.std).log_prob(value).mean((1, 2))
    torch.testing.assert_close(sde.log_prob(value, moments), expected, **CLOSE)
    other = flow_step(sde, 0.6, 0.5, x, v + 1)
    kl = torch.distributions.kl_divergence(
        Normal(moments.mean, moments.std), Normal(other.mean, other.std)
    )
    torch.testing.assert_close(moments.kl(other), kl.mean((1, 2)), **CLOSE)


def test_log_prob_of_cps_is_the_squared_distance():
    x, v, value = (normal(3, 2, 4, seed=seed) for seed in range(3))
    moments = flow_step(CPS(), 0.6, 0.5, x, v)
    expected = -(value - moments.mean).square().mean((1, 2))
    torch.testing.assert_close(CPS().log_prob(value, moments), expected, **CLOSE)


def test_gradient_of_log_prob_in_closed_form():
    x, v, value = (normal(3, 4, seed=seed) for seed in range(3))
    v.requires_grad_()
    sde, s, s_next = FlowSDE(), 0.6, 0.5
    moments = flow_step(sde, s, s_next, x, v)
    sde.log_prob(value, moments).sum().backward()
    along = (s_next - s) * (1 + moments.rate**2 * (1 - s) / (2 * s))  # d mean / d v
    expected = (value - moments.mean) / moments.std**2 * along / 4
    torch.testing.assert_close(v.grad, expected.detach(), **CLOSE)


def ddim(prediction: str) -> DDIMScheduler:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction,
    )
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize("process_class", [Epsilon, VPrediction])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_that_of_diffusers(process_class: Any, eta: float):
    scheduler = ddim("epsilon" if process_class is Epsilon else "v_prediction")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    process = process_class(scheduler.alphas_cumprod)
    sde = DDIM(eta=eta or 1e-30)
    x, output = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    for i in (0, 5, 8):
        t, t_next = scheduler.timesteps[i], scheduler.timesteps[i + 1]
        moments = sde.moments(process, x, output, process.level(t), process.level(t_next))

        def theirs(i: int = i, **noise: Any) -> Tensor:
            t = int(scheduler.timesteps[i])
            return scheduler.step(output, t, x, eta=eta, return_dict=False, **noise)[0]

        mean = theirs(variance_noise=torch.zeros_like(x))
        torch.testing.assert_close(moments.mean, mean, rtol=1e-9, atol=1e-10)
        if eta:
            added = theirs(variance_noise=torch.ones_like(x)) - mean
            torch.testing.assert_close(added, torch.full_like(x, moments.std), rtol=1e-9, atol=0)
            drawn = theirs(generator=torch.Generator().manual_seed(3))
            mine = moments.mean + moments.std * normal(*x.shape, seed=3)
            torch.testing.assert_close(mine, drawn, rtol=1e-9, atol=1e-10)


def test_a_schedule_that_starts_without_signal():
    """v prediction at a = 0, where the sample is noise alone."""
    process = VPrediction(torch.tensor([0.9, 0.5, 0.0]))
    x, output = normal(2, 4), normal(2, 4, seed=1)
    moments = DDIM().moments(
        process, x, output, process.level(torch.tensor(2)), process.level(torch.tensor(1))
    )
    torch.testing.assert_close(moments.mean, -math.sqrt(0.5) * output)
    assert moments.std == pytest.approx(math.sqrt(0.5))


def test_precision():
    x, v = normal(2, 4).bfloat16(), normal(2, 4, seed=1).bfloat16()
    assert flow_step(CPS(), 0.6, 0.5, x, v).mean.dtype == torch.float32
    assert flow_step(CPS(), 0.6, 0.5, x.double(), v).mean.dtype == torch.float64


def test_what_has_no_density_is_refused():
    x = normal(2, 4)
    for s, s_next in ((0.2, 0.0), (0.2, 0.2), (0.2, 0.5), (1.5, 0.5)):
        with pytest.raises(ValueError, match="density"):
            flow_step(FlowSDE(), s, s_next, x, x)
    for sde, process in (
        (FlowSDE(), Epsilon(torch.tensor([0.5]))),
        (CPS(), FlowMatching(inverted=True)),
        (DDIM(), FLOW),
    ):
        with pytest.raises(ValueError, match="no sampler of"):
            sde.moments(process, x, x, at(0.6), at(0.5))
    with pytest.raises(ValueError, match="one shape"):
        flow_step(FlowSDE(), 0.6, 0.5, x, x[:1])


@pytest.mark.parametrize(
    "wrong",
    [(FlowSDE, {"noise_level": 0}), (CPS, {"noise_level": 1.1}), (DDIM, {"eta": 0})],
)
def test_settings_without_a_density_are_refused(wrong):
    kind, settings = wrong
    with pytest.raises(ValueError, match=next(iter(settings))):
        kind(**settings)
