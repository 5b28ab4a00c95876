from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from dgpo.core import Epsilon, FlowMatching, Level, VPrediction
from dgpo.errors import UserError

ALPHAS = DDIMScheduler(beta_schedule="scaled_linear").alphas_cumprod
PROCESSES = [FlowMatching(), FlowMatching(inverted=True), Epsilon(ALPHAS), VPrediction(ALPHAS)]


def samples(dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, *(shape or (3, 4, 5, 5)), generator=generator, dtype=torch.float64)
    return x0.to(dtype), noise.to(dtype)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("timestep", [1, 300, 999])
def test_the_target_leads_back_to_the_clean_sample(process, timestep):
    level = Level(torch.tensor(timestep), timestep / 1000)
    x0, noise = samples(torch.float64)
    xt = process.corrupt(x0, noise, level)
    back = process.x0(xt, process.target(x0, noise, level), level)
    torch.testing.assert_close(back, x0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_half_precision_is_widened_before_the_arithmetic(process):
    """Trap 6: x_s and the target are those of the widened inputs."""
    level = Level(torch.tensor(300), 0.3)
    x0, noise = samples(torch.bfloat16)
    for method in (process.corrupt, process.target, process.x0):
        result = method(x0, noise, level)
        assert result.dtype == torch.float32
        exact = method(x0.double(), noise.double(), level)
        assert exact.dtype == torch.float64
        assert (result - exact).abs().max() < 1e-5
    sprung = (1 - 0.3) * x0 + 0.3 * noise
    assert (sprung - FlowMatching().corrupt(x0, noise, level)).abs().max() > 1e-3


def test_flow_matching_is_that_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x0, noise = samples(torch.float32)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        level = Level(t, float(sigma))
        theirs = scheduler.scale_noise(x0, t[None].expand(3), noise)
        torch.testing.assert_close(FlowMatching().corrupt(x0, noise, level), theirs)


@pytest.mark.parametrize("inverted", [False, True])
def test_the_target_is_the_velocity_that_the_euler_step_expects(inverted):
    """One step of diffusers' solver along the true target lands on the same path."""
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=inverted)
    scheduler.set_timesteps(10)
    process = FlowMatching(inverted)
    levels = [Level(torch.tensor(0.0), float(s)) for s in scheduler.sigmas]
    x0, noise = samples(torch.float32)
    for i, t in enumerate(scheduler.timesteps[:-1]):
        xt = process.corrupt(x0, noise, levels[i])
        step = scheduler.step(process.target(x0, noise, levels[i]), t, xt, return_dict=False)[0]
        expected = process.corrupt(x0, noise, levels[i + 1])
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("timestep", [1, 500, 981])
def test_variance_preserving_processes_are_those_of_diffusers(timestep):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    x0, noise = samples(torch.float32)
    t = torch.tensor(timestep)
    for process in (Epsilon(scheduler.alphas_cumprod), VPrediction(scheduler.alphas_cumprod)):
        theirs = scheduler.add_noise(x0, noise, t[None])
        torch.testing.assert_close(process.corrupt(x0, noise, process.level(t)), theirs)
    velocity = scheduler.get_velocity(x0, noise, t[None])
    torch.testing.assert_close(process.target(x0, noise, process.level(t)), velocity)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_clean_sample_is_that_of_the_ddim_step(kind):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type=kind, clip_sample=False
    )
    scheduler.set_timesteps(10)
    process = {"epsilon": Epsilon, "v_prediction": VPrediction}[kind](scheduler.alphas_cumprod)
    xt, output = samples(torch.float32)
    for t in scheduler.timesteps:
        theirs = scheduler.step(output, t, xt).pred_original_sample
        ours = process.x0(xt, output, process.level(t))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_levels_of_noise_prediction_lie_between_zero_and_one():
    levels = [Epsilon(ALPHAS).level(torch.tensor(t)) for t in (0, 500, 999)]
    sigmas = [level.sigma for level in levels]
    assert 0 < sigmas[0] < sigmas[1] < sigmas[2] < 1
    assert sigmas[1] == pytest.approx(float((1 - ALPHAS[500]).sqrt()), rel=1e-6)


@pytest.mark.parametrize("timestep", [0.5, -1, 1000])
def test_a_timestep_outside_the_table_is_refused(timestep):
    with pytest.raises(UserError, match=r"rollout\.scheduler"):
        Epsilon(ALPHAS).level(torch.tensor(timestep))


def test_between_two_timesteps_the_level_says_how_noisy_it_is():
    """Samplers such as Euler over the whole schedule stop between two entries of the table."""
    x0, noise = samples(torch.float64)
    level = Level(torch.tensor(888.8), 0.6)
    for process in (Epsilon(ALPHAS), VPrediction(ALPHAS)):
        torch.testing.assert_close(process.corrupt(x0, noise, level), 0.8 * x0 + 0.6 * noise)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_shapes_are_not_broadcast(process):
    level = Level(torch.tensor(300), 0.3)
    for method in (process.corrupt, process.target, process.x0):
        with pytest.raises(ValueError, match="one shape"):
            method(torch.zeros(4, 3), torch.zeros(1, 3), level)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_the_noise_level_is_the_factor_of_the_noise(process):
    level = Level(torch.tensor(300), 0.3)
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    xt = process.corrupt(torch.zeros_like(noise), noise, level)
    torch.testing.assert_close(xt, process.noise_level(level) * noise)
