"""Each sampler of the recipe with each kind of denoiser: it works, or is refused with a reason."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dgpo.core.process import FlowMatching, Level
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.self_check import self_check
from dgpo.models.samplers.schedulers import make_scheduler
from families.tiny import TINY, build, conditioning

SAMPLERS = ("ddim", "pndm", "euler", "heun", "dpmsolver++", "unipc", "deis")
ZERO_SNR: dict[str, Any] = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow": ("sd3", {}),
    "epsilon": ("sd15", {}),
    "epsilon, fractional timesteps": ("sd15", {"timestep_spacing": "linspace"}),
    "v": ("sd15", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    "v, zero terminal SNR": ("sd15", ZERO_SNR),
    "v, shifted SNR": ("cogvideox", {}),
}
"""A tiny pipeline and what its scheduler has besides."""
_STEP = "its step is written for noise and v prediction"
REFUSED: dict[str, dict[str, str]] = {
    "flow": {"ddim": _STEP, "pndm": _STEP, "deis": "leaves noise in the picture"},
    "v, zero terminal SNR": dict.fromkeys(("pndm", "deis", "heun"), "rescale_betas_zero_snr=True"),
    "v, shifted SNR": dict.fromkeys(set(SAMPLERS) - {"ddim"}, "cannot carry snr_shift_scale"),
}


@functools.cache
def made(kind: str) -> tuple[PipelineModel, Conditioning]:
    name, settings = SETTINGS[kind]
    pipe = build(name)
    if settings:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **settings)
    model = PipelineModel(pipe, call=TINY[name].call)
    return model, conditioning(name, model)


def rollout(kind: str, scheduler: Any, steps: int = 4) -> Any:
    model, cond = made(kind)
    generators = [torch.Generator().manual_seed(i) for i in range(cond.size)]
    return model.rollout(
        cond, steps=steps, scheduler=scheduler, generators=generators, decode=False, record=True
    )


WORKING = [(n, k) for k in SETTINGS for n in SAMPLERS if n not in REFUSED.get(k, {})]


@pytest.mark.parametrize(("name", "kind"), WORKING)
def test_it_works(name: str, kind: str) -> None:
    model, cond = made(kind)
    scheduler = make_scheduler(name, model.pipe.scheduler)
    untouched = getattr(scheduler, "num_inference_steps", None)
    report = self_check(model, cond, [scheduler])  # raises where anything differs
    assert len(report.points) >= 6  # three steps or more, guidance off and on
    one, two = rollout(kind, scheduler), rollout(kind, scheduler)
    assert torch.equal(one.x0, two.x0)
    assert one.x0.isfinite().all()
    assert [step.level for step in one.steps] == [step.level for step in two.steps]
    assert getattr(scheduler, "num_inference_steps", None) == untouched  # copies ran, not it


@pytest.mark.parametrize(("name", "kind"), WORKING)
def test_its_levels_fall_and_are_those_of_the_training_schedule(name: str, kind: str) -> None:
    model, _ = made(kind)
    base = model.pipe.scheduler
    levels = rollout(kind, make_scheduler(name, base)).levels
    sigmas = [level.sigma for level in levels]
    assert len(levels) == 4
    assert sigmas == sorted(set(sigmas), reverse=True)
    for level in levels:
        # a flow's timesteps are rounded by some samplers
        expected = float(level.timestep) / 1000 if kind == "flow" else _sigma(base, level)
        assert level.sigma == pytest.approx(expected, abs=1e-3 if kind == "flow" else 1e-5)


def _sigma(base: Any, level: Level) -> float:
    """Of the training schedule at a timestep; between two, linear in the noise-to-signal ratio."""
    alphas = base.alphas_cumprod.double().clamp(min=2**-24).numpy()
    ratio = np.interp(float(level.timestep), np.arange(len(alphas)), ((1 - alphas) / alphas) ** 0.5)
    return float(ratio) / math.sqrt(1 + float(ratio) ** 2)


@pytest.mark.parametrize("kind", [k for k in SETTINGS if k != "flow"])
def test_noised_samples_are_what_the_denoiser_sees_in_a_rollout(kind: str) -> None:
    """From level to level of the first-order step: x0 and noise of one make the sample of the next.

    Euler's own scaling, fractional timesteps and a last alpha of zero are all in it.
    """
    model, _ = made(kind)
    name = "ddim" if kind == "v, shifted SNR" else "euler"
    steps = rollout(kind, make_scheduler(name, model.pipe.scheduler)).steps
    process = model.process
    assert not isinstance(process, FlowMatching)
    for now, then in itertools.pairwise(steps[1:]):  # the first may have no signal
        x0 = process.x0(now.sample, now.output, now.level)
        one, zero = torch.ones_like(x0), torch.zeros_like(x0)
        noise = (now.sample - process.corrupt(x0, zero, now.level)) / process.noise_level(now.level)
        expected = process.corrupt(x0, noise, then.level)
        scale = float(then.sample.abs().max())
        assert float((expected - then.sample).abs().max()) < 1e-3 * scale
        assert torch.allclose(process.corrupt(zero, one, now.level), now.level.sigma * one)


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for k, names in REFUSED.items() for n in sorted(names)]
)
def test_it_is_refused_with_the_reason_and_what_fits(name: str, kind: str) -> None:
    with pytest.raises(UserError) as caught:
        make_scheduler(name, made(kind)[0].pipe.scheduler)
    message = str(caught.value)
    assert message.startswith(f"rollout.scheduler: {name!r}")
    assert REFUSED[kind][name] in message
    assert "'ddim'" in message or "these fit: euler, heun" in message


def test_a_pipeline_may_come_with_plms_as_stable_diffusion_does() -> None:
    pipe = build("sd15")
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    model = PipelineModel(pipe, call=TINY["sd15"].call)
    cond = conditioning("sd15", model)
    assert self_check(model, cond).ok
    own, named = (
        model.rollout(
            cond,
            steps=4,
            scheduler=make_scheduler(name, pipe.scheduler),
            generators=[torch.Generator().manual_seed(i) for i in range(cond.size)],
            decode=False,
        ).x0
        for name in (None, "pndm")
    )
    assert torch.equal(own, named)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_a_pipeline_may_come_with_a_sampler_that_has_no_sigmas(name: str) -> None:
    pipe = build("sd15")
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    model = PipelineModel(pipe, call=TINY["sd15"].call)
    report = self_check(model, conditioning("sd15", model))
    assert len({point.level.sigma for point in report.points}) == 3
    for point in report.points:
        assert point.level.sigma == pytest.approx(_sigma(pipe.scheduler, point.level), abs=1e-6)


def test_a_sampler_that_says_another_noise_level_is_refused() -> None:
    """The steps between two levels of KDPM2 are counted as if they were at the next level."""
    model, cond = made("epsilon")
    config = model.pipe.scheduler.config
    sampler = diffusers.KDPM2DiscreteScheduler.from_config(config)
    with pytest.raises(UserError, match=r"rollout\.scheduler: KDPM2DiscreteScheduler.*'ddim'"):
        self_check(model, cond, [sampler])
    karras = diffusers.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    assert self_check(model, cond, [karras]).ok  # it rounds its timesteps


def test_the_page_says_so() -> None:
    page = Path(__file__).parents[2] / "docs" / "samplers.md"
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    titles, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert titles == ["sampler", *(kind for kind in SETTINGS if "fractional" not in kind)]
    said = {
        (row[0], kind): verdict for row in rows for kind, verdict in zip(titles, row, strict=True)
    }
    for name, kind in itertools.product(SAMPLERS, titles[1:]):
        assert said[name, kind] == ("refused" if name in REFUSED.get(kind, {}) else "yes")


def test_deis_does_end_a_flow_with_noise_left() -> None:
    """If this fails, diffusers mended it, and deis may join the samplers for flow matching."""
    deis = diffusers.DEISMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    deis.set_timesteps(10)
    assert deis.sigmas[-1] == deis.sigmas[-2] > 0.2


def test_what_clips_the_clean_sample_is_not_lost() -> None:
    base = diffusers.DDIMScheduler(clip_sample=True, thresholding=True)
    assert make_scheduler("ddim", base).config.clip_sample
    for name in ("pndm", "euler", "dpmsolver++", "unipc", "deis"):
        with pytest.raises(UserError, match="clip_sample=True"):
            make_scheduler(name, base)
    with pytest.raises(UserError, match="thresholding=True"):
        make_scheduler("heun", base)


def test_a_stochastic_sampler_of_the_pipelines_own_is_refused_and_checked_with_another() -> None:
    model, cond = made("v, shifted SNR")
    base: Any = diffusers.CogVideoXDPMScheduler.from_config(model.pipe.scheduler.config)
    with pytest.raises(UserError, match="CogVideoXDPMScheduler adds noise at every step"):
        make_scheduler(None, base)
    made_ddim = make_scheduler("ddim", base)
    assert isinstance(made_ddim, diffusers.CogVideoXDDIMScheduler)
    assert made_ddim.config["snr_shift_scale"] == base.config["snr_shift_scale"]
    own = model.pipe.scheduler
    try:
        model.pipe.scheduler = base
        assert self_check(PipelineModel(model.pipe, call=model.call), cond).ok
    finally:
        model.pipe.scheduler = own
