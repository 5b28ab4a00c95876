"""The pipeline as the denoiser: the same numbers as the pipeline itself, on every family."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    SkipLayerGuidance,
)
from PIL import Image

from dgpo.core import DDIM
from dgpo.core.process import FlowMatching, Level
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.self_check import self_check
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.models.samplers.sde_schedulers import make_sde_scheduler
from families.tiny import FAST, TINY, build, conditioning, sd3_small
from families.video import hunyuan_video15

CALL = TINY["sd3"].call


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


@pytest.fixture(scope="module")
def sd3_model() -> PipelineModel:
    return PipelineModel(build("sd3"), call=CALL)


@pytest.mark.parametrize("name", FAST)  # families/test_matrix.py has them all
def test_the_self_check_reports_every_point(name: str) -> None:
    model = PipelineModel(build(name), call=TINY[name].call)
    report = self_check(model, conditioning(name, model))
    assert report.ok
    assert len(report.points) == 6  # three steps, guidance off and on
    assert {point.guidance_scale for point in report.points} == {1.0, 3.0}
    assert all(point.difference == 0.0 for point in report.points)
    assert report.step_error < 1e-5
    assert type(model.pipe).__name__ in str(report)


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("sd3", {"guidance_scale": 1.0}),
        ("sdxl", {"guidance_scale": 1.0}),
        ("flux", {"true_cfg_scale": 1.0}),
        ("qwen", {"true_cfg_scale": 1.0}),
        ("zimage", {"guidance_scale": 0.0}),
    ],
)
def test_guidance_is_off_where_asked(name: str, off: dict[str, float]) -> None:
    model = PipelineModel(build(name), call=TINY[name].call)
    cond = conditioning(name, model)
    plain = Conditioning(cond.call_kwargs(guidance=False), cond.size)
    rows: list[int] = []
    for denoiser in model.denoisers.values():
        denoiser.register_forward_hook(lambda m, i, o: rows.append(len(o[0])))
    x0 = model.rollout(plain, steps=3, generators=generators(2), decode=False).x0
    assert model.guidance._off == off
    assert rows[-3:] == [2, 2, 2]
    same = model.rollout(cond, steps=3, generators=generators(2), decode=False).x0
    assert torch.equal(x0, same)
    guided = model.rollout(
        cond, steps=3, guidance_scale=3.0, generators=generators(2), decode=False
    ).x0
    assert not torch.allclose(guided, x0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("sd3", {"height": 50, "width": 48}, r"StableDiffusion3Pipeline.*height=50.*divisible"),
        ("sd15", {"height": 34, "width": 32}, r"StableDiffusionPipeline.*height=34"),
    ],
)
def test_a_size_that_the_pipeline_refuses(name: str, call: dict[str, Any], message: str) -> None:
    model = PipelineModel(build(name), call=call)
    with pytest.raises(UserError, match=message):
        model.rollout(model.encode(["red dog"], guidance=False), steps=2)


def test_guidance_is_set_in_a_guider() -> None:
    model = PipelineModel(build("hunyuan_video15"), call=TINY["hunyuan_video15"].call)
    guider, cond = model.pipe.guider, conditioning("hunyuan_video15", model)
    rows: list[int] = []
    model.pipe.transformer.register_forward_hook(lambda m, i, o: rows.append(len(o[0])))
    samples = [
        model.rollout(cond, steps=2, guidance_scale=s, generators=generators(2), decode=False).x0
        for s in (1.0, 6.0, 3.0)
    ]
    assert rows == [1] + [2] * 10  # the probe, two passes without guidance, four with it
    assert not torch.allclose(samples[1], samples[2], atol=1e-3)
    assert model.pipe.guider is guider and guider.guidance_scale == 6.0
    own = model.pipe(
        **cond.call_kwargs(True),
        **model.call,
        num_inference_steps=2,
        generator=generators(2),
        output_type="latent",
        return_dict=False,
    )[0]
    assert torch.equal(samples[1], own)


@pytest.mark.parametrize(
    "guider",
    [
        AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5),
        ClassifierFreeGuidance(stop=0.5),
        SkipLayerGuidance(skip_layer_guidance_layers=[0], skip_layer_guidance_stop=1.0),
    ],
)
def test_a_guider_that_remembers_or_counts_steps_is_left_off(guider: Any) -> None:
    model = PipelineModel(hunyuan_video15(guider), call=TINY["hunyuan_video15"].call)
    cond = conditioning("hunyuan_video15", model)
    report = self_check(model, cond)
    assert {point.guidance_scale for point in report.points} == {1.0}
    with pytest.raises(UserError, match=r"guidance_scale=3\.0: .*remembers or counts"):
        model.rollout(cond, steps=2, guidance_scale=3.0)


def test_a_size_that_the_pipeline_would_round() -> None:
    model = PipelineModel(build("flux"), call={**TINY["flux"].call, "height": 37})
    cond = model.encode(["red dog"], guidance=False)
    with pytest.raises(UserError, match=r"rollout\.call\.height = 37: FluxPipeline makes 3\d"):
        model.rollout(cond, steps=2)


def test_a_pipeline_without_prompts_is_refused() -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    with pytest.raises(UserError, match="DDPMPipeline: it has no encode_prompt"):
        PipelineModel(DDPMPipeline(unet, DDPMScheduler()))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", ["sd3", "sd15", "sdxl", "wan", "flux"])
def test_a_rollout_is_what_a_user_gets_from_the_pipeline(name: str, scale: float) -> None:
    model = PipelineModel(build(name), call=TINY[name].call)
    prompts = ["a photo of cat", "red dog on the small blue house"]
    key = "true_cfg_scale" if name == "flux" else "guidance_scale"
    if scale != 1.0 and name != "wan":
        negative: Any = ["", ""]  # what an absent negative prompt stands for
        if name == "sdxl":
            negative = None  # it is zeros here
    else:
        negative = None
    latents = model.pipe(
        prompt=prompts,
        negative_prompt=negative,
        **{key: scale},
        **model.call,
        num_inference_steps=3,
        generator=generators(2),
        output_type="latent",
        return_dict=False,
    )[0]
    cond = model.encode(prompts, guidance=scale != 1.0)
    x0 = model.rollout(
        cond, steps=3, guidance_scale=scale, generators=generators(2), decode=False
    ).x0
    torch.testing.assert_close(x0, latents, atol=1e-4, rtol=1e-4)


def test_pictures_are_those_of_the_pipeline(sd3_model: PipelineModel) -> None:
    cond = sd3_model.encode(["a photo of cat", "red dog"], guidance=False)
    rollout = sd3_model.rollout(cond, steps=3, generators=generators(2))
    assert rollout.images is not None
    assert [image.size for image in rollout.images] == [(32, 32)] * 2
    assert all(isinstance(image, Image.Image) for image in rollout.images)
    own = sd3_model.pipe(
        **sd3_model.arguments(cond, 1.0), num_inference_steps=3, generator=generators(2)
    ).images
    assert [i.tobytes() for i in own] == [i.tobytes() for i in rollout.images]
    assert rollout.x0.shape == (2, 4, 16, 16)


def test_a_picture_does_not_depend_on_its_batch(sd3_model: PipelineModel) -> None:
    cond = sd3_model.encode(["a photo of cat", "red dog", "big table"], guidance=False)
    together = sd3_model.rollout(cond, steps=3, generators=generators(3), decode=False).x0
    one = cond.rows(torch.tensor([2]))
    alone = sd3_model.rollout(one, steps=3, generators=generators(1, first=2), decode=False).x0
    torch.testing.assert_close(alone[0], together[2], atol=1e-5, rtol=1e-5)


def test_groups_are_expanded_row_by_row(sd3_model: PipelineModel) -> None:
    cond = sd3_model.encode(["a photo of cat", "red dog"], guidance=True)
    repeated = cond.repeat(3)
    assert repeated.size == 6
    for name, value in cond.kwargs.items():
        for row in range(6):
            assert torch.equal(repeated.kwargs[name][row], value[row // 3])


@pytest.mark.parametrize("name", ["heun", "dpmsolver++", "unipc"])
def test_every_recorded_point_can_be_evaluated_again(sd3_model: PipelineModel, name: str) -> None:
    cond = conditioning("sd3", sd3_model)
    rollout = sd3_model.rollout(
        cond,
        steps=4,
        scheduler=make_scheduler(name, sd3_model.pipe.scheduler),
        generators=generators(2),
        decode=False,
        record=True,
    )
    # Heun asks the denoiser twice at every level but the first
    assert len(rollout.steps) == (7 if name == "heun" else 4)
    assert len(rollout.levels) == 4
    assert torch.equal(rollout.x0, rollout.steps[-1].previous)
    with torch.no_grad():
        for step in rollout.steps:
            again = sd3_model.predict(step.sample, step.level, cond)
            assert torch.equal(again, step.output)


def test_predict_has_gradients_and_rollouts_have_none(sd3_model: PipelineModel) -> None:
    cond = conditioning("sd3", sd3_model)
    rollout = sd3_model.rollout(cond, steps=2, decode=False)
    assert not rollout.x0.requires_grad
    xt = rollout.x0.clone().requires_grad_(True)
    output = sd3_model.predict(xt, rollout.levels[1], cond)
    assert output.shape == xt.shape
    (gradient,) = torch.autograd.grad(output.square().sum(), xt)
    assert float(gradient.abs().sum()) > 0
    with torch.no_grad():
        assert not sd3_model.predict(xt, rollout.levels[1], cond).requires_grad


def test_the_gradient_is_the_derivative() -> None:
    pipe = build("sd3").to(torch.float64)
    model = PipelineModel(pipe, call=CALL)
    cond = conditioning("sd3", model, size=1)
    xt = torch.randn(1, 4, 16, 16, dtype=torch.float64, generator=generators(1)[0])
    direction = torch.randn(xt.shape, dtype=torch.float64, generator=generators(1, first=1)[0])
    level = Level(torch.tensor(500.0, dtype=torch.float64), 0.5)

    def value(x: torch.Tensor) -> torch.Tensor:
        return model.predict(x, level, cond, 2.0).square().sum()

    leaf = xt.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    with torch.no_grad():
        slope = (value(xt + 1e-6 * direction) - value(xt - 1e-6 * direction)) / 2e-6
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-5)


def test_nothing_is_left_behind(sd3_model: PipelineModel) -> None:
    pipe = sd3_model.pipe
    pipe.set_progress_bar_config(desc="the user's own")
    scheduler, config = pipe.scheduler, dict(pipe.config)
    cond = conditioning("sd3", sd3_model)
    rollout = sd3_model.rollout(cond, steps=2, generators=generators(2), decode=False)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    sd3_model.predict(rollout.x0, rollout.levels[0], cond)
    with pytest.raises(ValueError, match="height and width"):
        sd3_model.predict(torch.zeros(2, 4, 8, 8), rollout.levels[0], cond)
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.scheduler is scheduler
    assert dict(pipe.config) == config
    assert "step" not in vars(scheduler)
    assert "prepare_latents" not in vars(pipe)
    assert pipe._progress_bar_config == {"desc": "the user's own"}


def test_no_zero_tokens_are_appended_when_none_are_wanted() -> None:
    pipe = sd3_small()
    call = {"height": 32, "width": 32, "max_sequence_length": 0}
    model = PipelineModel(pipe, call=call)
    cond = model.encode(["a photo of cat", "red dog"], guidance=True)
    assert cond.kwargs["prompt_embeds"].shape == (2, 16, 64)
    assert cond.kwargs["negative_prompt_embeds"].shape == (2, 16, 64)
    lengths: list[int] = []
    pipe.transformer.register_forward_hook(
        lambda m, a, k, o: lengths.append(k["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    rollout = model.rollout(cond, steps=2, guidance_scale=2.0, decode=False)
    model.predict(rollout.x0, rollout.levels[0], cond)
    assert set(lengths) == {16}
    longer = PipelineModel(sd3_small(), call={**call, "max_sequence_length": 4})
    assert longer.encode(["a photo"], guidance=False).kwargs["prompt_embeds"].shape[1] == 20


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"hieght": 32}, ["rollout.call.hieght", "did you mean height?"]),
        ({"num_inference_steps": 3}, ["rollout.steps"]),
        ({"guidance_scale": 3.0}, ["rollout.guidance_scale"]),
        ({"latents": None}, ["rollout.call.latents"]),
        ({"skip_guidance_layers": [0]}, ["rollout.call.skip_guidance_layers", "a step's number"]),
        ({"denoising_end": 0.5}, ["rollout.call.denoising_end", "ends with a clean sample"]),
        ({"denoising_start": 0.5}, ["rollout.call.denoising_start", "starts from noise"]),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        PipelineModel(build("sdxl" if "denoising" in next(iter(call)) else "sd3"), call=call)
    for word in words:
        assert word in str(caught.value)


def test_an_embedded_guidance_is_an_argument_of_the_call() -> None:
    model = PipelineModel(build("flux"), call={**TINY["flux"].call, "guidance_scale": 2.0})
    other = PipelineModel(build("flux"), call={**TINY["flux"].call, "guidance_scale": 9.0})
    cond = conditioning("flux", model)
    a = model.rollout(cond, steps=2, generators=generators(2), decode=False).x0
    b = other.rollout(cond, steps=2, generators=generators(2), decode=False).x0
    assert not torch.allclose(a, b, atol=1e-4)


def test_wrong_sizes_and_missing_negatives_are_refused(sd3_model: PipelineModel) -> None:
    cond = sd3_model.encode(["a photo of cat", "red dog"], guidance=False)
    with pytest.raises(UserError, match="3 generators for 2"):
        sd3_model.rollout(cond, steps=2, generators=generators(3))
    with pytest.raises(UserError, match="guidance=True"):
        sd3_model.rollout(cond, steps=2, guidance_scale=4.0)
    with pytest.raises(ValueError, match="3 samples"):
        sd3_model.predict(torch.zeros(3, 4, 16, 16), Level(torch.tensor(1.0), 0.001), cond)


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    pipe = build("sd3")
    pipe.register_modules(transformer=None)
    with pytest.raises(UserError, match="transformer"):
        PipelineModel(pipe)


def test_self_check_refuses_a_denoiser_that_does_not_repeat_itself() -> None:
    model = PipelineModel(build("sd3"), call=CALL)
    model.pipe.transformer.register_forward_hook(
        lambda m, i, o: (o[0] + 1e-6 * torch.randn_like(o[0]),)
    )
    with pytest.raises(UserError, match="does not repeat") as caught:
        self_check(model)
    assert "differs by" in str(caught.value)


def test_self_check_refuses_a_denoiser_without_gradients() -> None:
    model = PipelineModel(build("sd3"), call=CALL)
    model.pipe.transformer.register_forward_hook(lambda m, i, o: (o[0].detach(),))
    with pytest.raises(UserError, match="no gradients"):
        self_check(model)


def test_self_check_refuses_another_sign_of_the_output() -> None:
    model = PipelineModel(build("sd3"), call=CALL)
    model.process = FlowMatching(inverted=True)
    with pytest.raises(UserError, match="sign"):
        self_check(model)


def test_self_check_refuses_a_model_that_answers_nan() -> None:
    model = PipelineModel(build("sd3"), call=CALL)
    model.pipe.transformer.register_forward_hook(lambda m, i, o: (o[0] * float("nan"),))
    with pytest.raises(UserError):
        self_check(model)


def test_self_check_tries_the_samplers_of_the_run() -> None:
    """One that integrates something else is found, though the pipeline's own is right."""
    model = PipelineModel(build("sd15"), call=TINY["sd15"].call)
    cond = conditioning("sd15", model)
    named = make_scheduler("dpmsolver++", model.pipe.scheduler)
    noisy = make_sde_scheduler(DDIM(), model.pipe.scheduler)
    report = self_check(model, cond, [named, noisy], guidance_scale=4.5)
    seen = {(point.sampler, point.guidance_scale) for point in report.points}
    assert {name for name, _ in seen} == {"DPMSolverMultistepScheduler", "DdimSdeScheduler"}
    assert {scale for _, scale in seen} == {1.0, 4.5}
    named.register_to_config(prediction_type="v_prediction")
    with pytest.raises(UserError, match="does not integrate"):
        self_check(model, cond, [named])


def test_self_check_names_what_a_pipeline_raises(sd3_model: PipelineModel) -> None:
    def broken(module: Any, inputs: Any, output: Any) -> None:
        if output[0].requires_grad:
            raise IndexError("index 1 is out of bounds")

    hook = sd3_model.pipe.transformer.register_forward_hook(broken)
    try:
        with pytest.raises(UserError) as caught:
            self_check(sd3_model)
    finally:
        hook.remove()
    assert isinstance(caught.value.__cause__, IndexError)
    words = ["StableDiffusion3Pipeline", "IndexError: index 1 is out", "rollout.call.height"]
    for word in [*words, "rollout.scheduler", "dgpo check"]:
        assert word in str(caught.value)


def test_a_pipeline_that_steps_a_copy_of_its_scheduler_is_refused() -> None:
    """As LTX-2 and Kandinsky 6 do with their sound."""
    model = PipelineModel(build("sd3"), call=CALL)
    cond = conditioning("sd3", model)
    model.guidance.off(cond)
    sound = torch.zeros(1, 3)

    def sounds(module: Any, inputs: Any, output: Any) -> None:
        second = copy.deepcopy(model.pipe.scheduler)
        second.step(sound, second.timesteps[0], sound)

    model.pipe.transformer.register_forward_hook(sounds)
    with pytest.raises(UserError, match="second scheduler"):
        model.rollout(cond, steps=3)
    with pytest.raises(UserError, match="second scheduler"):
        model.predict(torch.zeros(2, 4, 16, 16), Level(torch.tensor(500.0), 0.5), cond)
    fresh = PipelineModel(model.pipe, call=CALL)
    with pytest.raises(UserError, match="second scheduler"):
        fresh.has_guidance(cond)  # before a rollout, as in dgpo plan


def test_a_scheduler_that_is_given_two_samples_is_refused(sd3_model: PipelineModel) -> None:
    def sounds(module: Any, inputs: Any, output: Any) -> None:
        sound = torch.zeros(1, 3)
        sd3_model.pipe.scheduler.step(sound, sd3_model.pipe.scheduler.timesteps[0], sound)

    cond = conditioning("sd3", sd3_model)
    sd3_model.guidance.off(cond)
    hook = sd3_model.pipe.transformer.register_forward_hook(sounds)
    try:
        with pytest.raises(UserError, match=r"shape \(1, 3\) and of \(2, 4, 16, 16\)"):
            sd3_model.rollout(cond, steps=3)
    finally:
        hook.remove()


def test_self_check_refuses_guidance_that_depends_on_a_steps_number() -> None:
    model = PipelineModel(build("sd3"), call=CALL)
    model._fixed["skip_guidance_layers"] = [0]
    assert self_check(model, guidance_scale=4.5).ok  # in three steps no layer is skipped
    assert self_check(model, steps=10).ok
    with pytest.raises(UserError, match=r"rollout.guidance_scale: .*step 1 of 10.*height"):
        self_check(model, guidance_scale=4.5, steps=10)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_self_check_refuses_guidance_that_changes_nothing(
    sd3_model: PipelineModel, scale: float
) -> None:
    with pytest.raises(UserError, match=rf"guidance_scale: {scale:g} changes nothing in StableD"):
        self_check(sd3_model, guidance_scale=scale)


def test_self_check_lets_guidance_be_off_as_a_pipeline_writes_it() -> None:
    model = PipelineModel(build("zimage"), call=TINY["zimage"].call)
    cond = conditioning("zimage", model)
    assert self_check(model, cond, guidance_scale=0.0).ok  # Z-Image counts from 0
    assert self_check(model, cond, guidance_scale=0.5).ok


def test_self_check_lets_a_sampler_of_the_pipelines_own_add_noise() -> None:
    pipe = build("sd15")
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    model = PipelineModel(pipe, call=TINY["sd15"].call)
    assert self_check(model, conditioning("sd15", model)).ok


def test_a_switch_of_the_call_is_true_or_false() -> None:
    with pytest.raises(UserError, match=r"call\.clean_caption = 'no': write true or false"):
        PipelineModel(build("pixart_sigma"), call={"clean_caption": "no"})
    PipelineModel(build("pixart_sigma"), call={"clean_caption": False})
