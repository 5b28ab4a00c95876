"""Samplers by name keep the base's schedule, converge to the exact solution, report levels."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch

from dgpo.core.process import Epsilon, FlowMatching, Level, VPrediction
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.probes import Recording
from dgpo.models.pipeline.self_check import self_check
from dgpo.models.samplers.schedulers import fresh, make_scheduler, process_of
from families.tiny import TINY, build, conditioning

FLOW = ("euler", "heun", "dpmsolver++", "unipc")
NOISE = ("ddim", "pndm", "dpmsolver++", "unipc", "deis", "euler", "heun")
MEAN, VARIANCE = 1.5, 0.25  # of the data, a one-dimensional Gaussian


def flow_base(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **settings})


def noise_base(**settings: Any) -> Any:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return diffusers.DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, **settings)


def integrate(scheduler: Any, steps: int) -> tuple[float, list[Level]]:
    """|x0 - exact x0| where the denoiser is that of the Gaussian, known in closed form."""
    recording = Recording()
    scheduler = fresh(scheduler)
    recording.listen(scheduler)
    scheduler.set_timesteps(steps)
    flow = isinstance(process_of(scheduler), FlowMatching)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    x, z = None, torch.linspace(-2, 2, 9)[:, None]
    for i, timestep in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "sigmas"):
            noise = float(scheduler.sigmas[i])
            signal = 1 - noise
            if not flow:
                signal = 1 / math.sqrt(1 + noise**2)
                noise *= signal
        else:
            signal = math.sqrt(scheduler.alphas_cumprod[int(timestep)])
            noise = math.sqrt(1 - signal**2)
        spread = math.sqrt(signal**2 * VARIANCE + noise**2)
        if x is None:
            x = signal * MEAN + spread * z
            if not flow:
                x = x / scale(torch.ones(1), timestep)  # Euler and Heun carry x / signal
        seen = scale(x, timestep)
        away = (seen - signal * MEAN) / spread**2
        e = noise * away
        x0 = MEAN + signal * VARIANCE * away
        x = scheduler.step(e - x0 if flow else e, timestep, x).prev_sample
    exact = MEAN + math.sqrt(VARIANCE) * z
    assert x is not None
    return float((x - exact).abs().max()), recording.levels


@pytest.mark.parametrize("name", FLOW)
def test_flow_samplers_converge_to_the_exact_solution(name: str) -> None:
    scheduler = make_scheduler(name, flow_base())
    coarse, middle, fine = (integrate(scheduler, steps)[0] for steps in (8, 32, 128))
    assert middle < coarse / 3
    assert fine < (0.025 if name == "euler" else 0.005)


def test_euler_is_of_first_order() -> None:
    errors = [integrate(make_scheduler("euler", flow_base()), n)[0] for n in (16, 32, 64)]
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.05)


def test_heun_is_of_second_order() -> None:
    errors = [integrate(make_scheduler("heun", flow_base()), n)[0] for n in (8, 16, 32)]
    assert min(errors[0] / errors[1], errors[1] / errors[2]) > 3.5


def test_second_order_samplers_beat_euler() -> None:
    euler = integrate(make_scheduler("euler", flow_base()), 32)[0]
    for name in ("heun", "dpmsolver++", "unipc"):
        assert integrate(make_scheduler(name, flow_base()), 32)[0] < 0.35 * euler, name


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", NOISE)
def test_noise_samplers_converge_to_the_exact_solution(name: str, spacing: str) -> None:
    scheduler = make_scheduler(name, noise_base(timestep_spacing=spacing))
    coarse, fine = (integrate(scheduler, steps)[0] for steps in (8, 100))
    assert fine < 0.5 * coarse
    assert fine < 0.05


@pytest.mark.parametrize("name", FLOW)
def test_flow_levels_are_those_of_the_shifted_schedule(name: str) -> None:
    levels = integrate(make_scheduler(name, flow_base()), 10)[1]
    sigmas = [level.sigma for level in levels]
    assert len(levels) == 10
    assert sigmas == sorted(set(sigmas), reverse=True)
    assert sigmas[0] == pytest.approx(1.0, abs=1e-3)
    for level in levels:
        assert float(level.timestep) == pytest.approx(1000 * level.sigma, abs=1.0)
    # shift 3 maps the middle of the schedule to about 3/4
    assert sigmas[5] > 0.7


def test_published_schedule() -> None:
    levels = integrate(make_scheduler("dpmsolver++", flow_base()), 10)[1]
    published = [999, 963, 922, 874, 817, 749, 666, 562, 428, 249]
    assert [int(level.timestep) for level in levels] == published


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpmsolver++", "unipc", "deis"])
def test_noise_levels_belong_to_their_timesteps(name: str) -> None:
    base = noise_base()
    for level in integrate(make_scheduler(name, base), 10)[1]:
        alpha = float(base.alphas_cumprod[int(level.timestep)])
        assert level.sigma == pytest.approx(math.sqrt(1 - alpha), abs=1e-5)


@pytest.mark.parametrize("name", FLOW)
def test_shift_and_training_steps_are_kept(name: str) -> None:
    made = make_scheduler(name, flow_base(shift=5.0, num_train_timesteps=500))
    assert made.config.get("flow_shift", made.config.get("shift")) == 5.0
    assert made.config.num_train_timesteps == 500


def test_shift_survives_the_way_back() -> None:
    wan = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=7.0
    )
    assert make_scheduler("euler", wan).config.shift == 7.0
    assert make_scheduler("heun", wan).config.shift == 7.0


def test_prediction_type_and_betas_are_kept() -> None:
    base = noise_base(prediction_type="v_prediction", timestep_spacing="trailing")
    for name in NOISE:
        made = make_scheduler(name, base)
        assert made.config.prediction_type == "v_prediction"
        assert made.config.timestep_spacing == "trailing"
        assert torch.equal(made.alphas_cumprod, base.alphas_cumprod)


def test_no_name_is_a_fresh_copy_of_the_base() -> None:
    base = flow_base()
    made = make_scheduler(None, base)
    assert made is not base
    assert dict(made.config) == dict(base.config)


@pytest.mark.parametrize(
    ("name", "base", "words"),
    [
        ("dpmsolver", flow_base(), ["'dpmsolver++'", "unipc"]),
        ("ddim", flow_base(), ["does not fit", "flow matching", "euler, heun"]),
        ("nonsense", noise_base(), ["no sampler 'nonsense'", "ddim, pndm"]),
        ("heun", flow_base(use_dynamic_shifting=True), ["use_dynamic_shifting", "euler"]),
        ("heun", flow_base(invert_sigmas=True), ["invert_sigmas"]),
    ],
)
def test_refusals_name_what_fits(name: str, base: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make_scheduler(name, base)
    for word in ["rollout.scheduler", *words]:
        assert word in str(caught.value)


def test_processes() -> None:
    assert process_of(flow_base()) == FlowMatching()
    assert process_of(flow_base(invert_sigmas=True)) == FlowMatching(inverted=True)
    assert isinstance(process_of(noise_base()), Epsilon)
    assert isinstance(process_of(noise_base(prediction_type="v_prediction")), VPrediction)
    with pytest.raises(UserError, match="sample"):
        process_of(noise_base(prediction_type="sample"))


def test_rollouts_of_a_pipeline_agree_between_samplers() -> None:
    model = PipelineModel(build("sd3"), call=TINY["sd3"].call)
    cond = conditioning("sd3", model)

    def x0(sampler: str, steps: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        scheduler = make_scheduler(sampler, model.pipe.scheduler)
        return model.rollout(
            cond, steps=steps, scheduler=scheduler, generators=generators, decode=False
        ).x0

    reference = x0("euler", 100)
    for name in ("heun", "dpmsolver++", "unipc"):
        away = (x0(name, 25) - reference).abs().max()
        assert away < 0.1 * reference.abs().max(), name


def test_multistep_state_is_fresh_for_every_rollout() -> None:
    model = PipelineModel(build("sd3"), call=TINY["sd3"].call)
    cond = conditioning("sd3", model)
    for name in FLOW:
        scheduler = make_scheduler(name, model.pipe.scheduler)
        twice = [
            model.rollout(
                cond,
                steps=4,
                scheduler=scheduler,
                generators=[torch.Generator().manual_seed(i) for i in range(2)],
                decode=False,
            ).x0
            for _ in range(2)
        ]
        assert torch.equal(*twice), name
        assert getattr(scheduler, "num_inference_steps", None) is None


OWN = """
import diffusers, torch

class Half(diffusers.FlowMatchEulerDiscreteScheduler):
    "Euler's steps, the time shifted once more."
    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.sigmas = self.sigmas ** 2
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps

class Noise(diffusers.DDIMScheduler):
    "DDIM as it is."

class Wrong(diffusers.EulerDiscreteScheduler):
    "It says another noise level than its timestep has in training."
    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.sigmas = self.sigmas * 0.7

def function(): ...
"""


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "my_sampler.py").write_text(OWN)
    return str(tmp_path / "my_sampler.py")


def test_a_sampler_of_the_users_own_is_named_by_a_path(own: str) -> None:
    made = make_scheduler(f"{own}:Half", flow_base(shift=5.0, num_train_timesteps=500))
    assert type(made).__name__ == "Half"
    assert (made.config.shift, made.config.num_train_timesteps) == (5.0, 500)
    errors = [integrate(make_scheduler(f"{own}:Half", flow_base()), n)[0] for n in (16, 32, 64)]
    assert errors[0] > 1.7 * errors[1] > 2.9 * errors[2]  # of first order
    same = make_scheduler("diffusers:UniPCMultistepScheduler", flow_base())
    assert same.config == make_scheduler("unipc", flow_base()).config


@pytest.mark.parametrize(("kind", "family"), [("Half", "sd3"), ("Noise", "sd15")])
def test_the_self_check_holds_it_to_what_it_holds_every_sampler(
    own: str, kind: str, family: str
) -> None:
    model = PipelineModel(build(family), call=TINY[family].call)
    sampler = make_scheduler(f"{own}:{kind}", model.pipe.scheduler)
    report = self_check(model, conditioning(family, model), [sampler])
    assert kind in {point.sampler for point in report.points} and report.ok


def test_the_self_check_refuses_one_that_says_another_noise_level(own: str) -> None:
    model = PipelineModel(build("sd15"), call=TINY["sd15"].call)
    sampler = make_scheduler(f"{own}:Wrong", model.pipe.scheduler)
    with pytest.raises(UserError, match=r"rollout\.scheduler: Wrong counts timestep"):
        self_check(model, conditioning("sd15", model), [sampler])


@pytest.mark.parametrize(
    ("kind", "base", "words"),
    [
        ("Noise", flow_base(), "a denoiser of Epsilon, and the pipeline's is one of FlowMatching"),
        ("Half", noise_base(), "a denoiser of FlowMatching, and the pipeline's is one of Epsilon"),
        ("function", noise_base(), "no scheduler class: derive one"),
        ("Hlaf", flow_base(), "did you mean 'Half'"),
        ("Noise", noise_base(rescale_betas_zero_snr=False, thresholding=True), None),
        ("Wrong", noise_base(thresholding=True), "cannot carry thresholding=True"),
        (
            "Noise",
            diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0),
            "cannot carry snr_shift_scale=3.0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(own: str, kind: str, base: Any, words: str | None) -> None:
    if words is None:
        assert make_scheduler(f"{own}:{kind}", base).config.thresholding
        return
    with pytest.raises(UserError, match=words):
        make_scheduler(f"{own}:{kind}", base)
