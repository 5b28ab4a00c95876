"""Pictures reach the pipeline with the rows they belong to, and the reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.arguments import parameters_of
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.row_groups import in_order, parts, steady_encoding
from dgpo.models.pipeline.self_check import self_check
from dgpo.prompts import load_prompts
from dgpo.prompts.caption import Caption
from dgpo.rewards import load_rewards
from dgpo.trainer import Trainer
from families.edit import flux_inpaint, mask, picture
from families.tiny import TINY, build, tiny_model
from tiny_runs import settings

ONE, OTHER = picture(), ImageOps.mirror(picture())


def texts(*given: Image.Image) -> list[str]:
    return [Caption("red dog", {"image": one}) for one in given]


def encoded(model: PipelineModel, prompts: list[str]) -> Conditioning:
    """All rows with the first one's embeddings, also where embeddings are random."""
    cond = model.encode(prompts, guidance=False)
    first = torch.zeros(cond.size, dtype=torch.long)
    return Conditioning({**cond.rows(first).kwargs, **pictures(cond)}, cond.size)


def pictures(cond: Conditioning) -> dict[str, Any]:
    return {name: v for name, v in cond.kwargs.items() if name in ("image", "mask_image")}


def samples(model: PipelineModel, prompts: list[str], **how: Any) -> Any:
    generators = [torch.Generator().manual_seed(7) for _ in prompts]
    return model.rollout(
        encoded(model, prompts), steps=4, generators=generators, decode=False, **how
    )


def test_rows_are_parted_by_picture_and_put_together_again() -> None:
    cond = Conditioning({"image": [ONE, OTHER, ONE, OTHER, OTHER]}, 5)
    rows = parts(cond)
    assert [part.tolist() for part in rows] == [[0, 2], [1, 3, 4]]
    assert in_order(rows, rows).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="height and width"):
        in_order([torch.zeros(2, 3), torch.zeros(3, 4)], rows)


@pytest.mark.parametrize("name", ["sd15_img2img", "sd3_img2img", "flux_kontext", "wan_i2v"])
def test_each_row_is_made_from_its_own_picture(name: str) -> None:
    model = tiny_model(name)
    mixed = samples(model, texts(ONE, OTHER, ONE), record=True)
    alone = samples(model, texts(OTHER), record=True)
    torch.testing.assert_close(mixed.x0[1:2], alone.x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.x0[0], mixed.x0[2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed.x0[0], mixed.x0[1], atol=1e-3)
    step, cond = mixed.steps[1], encoded(model, texts(ONE, OTHER, ONE))
    with torch.no_grad():
        assert torch.equal(model.predict(step.sample, step.level, cond), step.output)


def test_a_pipeline_that_wants_a_picture_for_each_row() -> None:
    model = tiny_model("cogvideox_i2v")
    mixed = samples(model, texts(ONE, OTHER, ONE), record=True)
    alone = samples(model, texts(ONE))
    torch.testing.assert_close(mixed.x0[:1], alone.x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.x0[0], mixed.x0[2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed.x0[0], mixed.x0[1], atol=1e-3)
    step, cond = mixed.steps[1], encoded(model, texts(ONE, OTHER, ONE))
    with torch.no_grad():
        assert torch.equal(model.predict(step.sample, step.level, cond), step.output)


def test_a_strength_leaves_out_the_first_levels() -> None:
    rollout = samples(tiny_model("sd15_img2img"), texts(ONE))
    assert len(rollout.levels) == 3  # 0.8 of four steps
    assert rollout.levels[0].sigma < 0.99


def test_rows_without_a_picture_are_refused() -> None:
    model = tiny_model("sd15_img2img")
    with pytest.raises(UserError, match="starts from a picture"):
        samples(model, ["red dog"])
    with pytest.raises(UserError, match="1 of 2 prompt rows"):
        model.encode([*texts(ONE), "red dog"], guidance=False)
    optional = samples(tiny_model("flux_kontext"), ["red dog"])
    assert torch.isfinite(optional.x0).all()


def painted(*masks: Image.Image) -> list[str]:
    return [Caption("red dog", {"image": ONE, "mask": one}) for one in masks]


@pytest.mark.parametrize("name", ["sd15_inpaint", "flux_fill"])
def test_each_row_is_painted_in_its_own_mask(name: str) -> None:
    model, mirrored = tiny_model(name), ImageOps.mirror(mask())
    assert mirrored.tobytes() != mask().tobytes()
    mixed = samples(model, painted(mask(), mirrored, mask()), record=True)
    alone = samples(model, painted(mirrored))
    torch.testing.assert_close(mixed.x0[1:2], alone.x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.x0[0], mixed.x0[2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed.x0[0], mixed.x0[1], atol=1e-3)
    step, cond = mixed.steps[1], encoded(model, painted(mask(), mirrored, mask()))
    with torch.no_grad():
        assert torch.equal(model.predict(step.sample, step.level, cond), step.output)


def test_a_picture_that_is_put_back_after_every_step_is_refused() -> None:
    model = PipelineModel(flux_inpaint(), call=TINY["flux_fill"].call)
    with pytest.raises(UserError, match="the scheduler does not integrate"):
        self_check(model, model.encode(painted(mask()), guidance=True))


def test_a_picture_around_a_mask_is_the_same_at_every_call() -> None:
    pipe = build("sd15_inpaint")
    own = pipe.vae.encode
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    with steady_encoding(pipe, parameters_of(pipe)):
        seen = pipe.vae.encode(pixels).latent_dist.sample(one)
    assert torch.equal(seen, own(pixels).latent_dist.mode())
    assert not torch.equal(seen, own(pixels).latent_dist.sample(other))
    # the random numbers that follow are those that would have followed
    assert torch.equal(torch.randn(3, generator=one), torch.randn(3, generator=other))
    assert pipe.vae.encode == own


@pytest.mark.parametrize(("name", "steady"), [("cogvideox_i2v", True), ("sd15_img2img", False)])
def test_a_picture_that_is_seen_at_every_step_is_the_same(name: str, steady: bool) -> None:
    pipe = build(name)
    own = pipe.vae.encode
    with steady_encoding(pipe, parameters_of(pipe)):
        assert (pipe.vae.encode != own) == steady
    parameters = {**parameters_of(build("sd15_img2img")), "control_image": None}
    with steady_encoding(pipe, parameters):
        assert pipe.vae.encode != own  # what a control is made of is looked at, beside the noise
    assert pipe.vae.encode == own


def test_masks_reach_the_reward() -> None:
    seen: list[Any] = []

    def reward(images: Any, prompts: Any, mask: Any, image: Any) -> list[float]:
        seen.extend(zip(mask, image, strict=True))
        return [0.0] * len(images)

    row = {"prompt": "red dog", "image": OTHER, "mask": mask().convert("RGB")}
    load_rewards(reward)([ONE], load_prompts([row]))
    ((area, around),) = seen
    assert area.mode == "L" and area.tobytes() == mask().tobytes()
    assert around.tobytes() == OTHER.tobytes()


def test_a_text_encoder_that_looks_at_the_picture() -> None:
    model = tiny_model("qwen_edit")
    both = model.encode([*texts(ONE), *texts(OTHER)], guidance=True)
    alone = model.encode(texts(OTHER), guidance=True)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        assert torch.equal(both.kwargs[name][1], alone.kwargs[name][0])
        assert not torch.allclose(both.kwargs[name][0], both.kwargs[name][1], atol=1e-5), name
    with pytest.raises(UserError, match="QwenImageEditPipeline starts from a picture"):
        model.encode(["red dog"], guidance=False)


def test_pictures_of_different_size_are_refused_before_the_run() -> None:
    wide = ONE.resize((48, 32))
    free = tiny_model("sd15_img2img")
    free.check_pictures(texts(ONE, OTHER))
    with pytest.raises(UserError, match=r"32 x 32 .* 48 x 32 .*rollout\.call\.height"):
        free.check_pictures(texts(ONE, wide))
    tiny_model("sd3_img2img").check_pictures(texts(ONE, wide))  # its call says height and width


def test_a_pipeline_that_makes_one_sample_a_call() -> None:
    model = tiny_model("qwen_edit_plus")
    cond = model.encode(texts(ONE, ONE, OTHER), guidance=True)
    mixed, alone = (
        model.rollout(
            cond.rows(torch.tensor(rows)),
            steps=3,
            generators=[torch.Generator().manual_seed(7) for _ in rows],
            decode=False,
            record=True,
        )
        for rows in ([0, 1, 2], [2])
    )
    assert torch.equal(mixed.x0[2:], alone.x0)
    assert torch.equal(mixed.x0[0], mixed.x0[1]) and not torch.equal(mixed.x0[0], mixed.x0[2])
    step = mixed.steps[1]
    with torch.no_grad():
        assert torch.equal(model.predict(step.sample, step.level, cond), step.output)


def test_every_size_is_tried_by_the_vae_alone() -> None:
    model = tiny_model("sd15_img2img")
    alike = [ONE.resize(size) for size in ((32, 32), (33, 32), (32, 33), (33, 33))]
    model.check_pictures(texts(*alike))
    asked: list[int] = []
    model.pipe.unet.register_forward_hook(lambda *_: asked.append(1))
    with pytest.raises(UserError, match=r"32 x 32 .* 64 x 64 .*rollout\.call\.height"):
        model.check_pictures(texts(*alike, ONE.resize((64, 64))))
    assert not asked


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_picture_that_lies_on_its_side(suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    wide, turned = tmp_path / f"wide.{suffix}", tmp_path / f"turned.{suffix}"
    ONE.resize((48, 32)).save(wide)
    ONE.resize((48, 32)).save(turned, exif=exif)
    rows = load_prompts([{"prompt": "red dog", "image": str(file)} for file in (wide, turned)])
    captions = [row.text for row in rows if isinstance(row.text, Caption)]
    assert [one.size_of("image") for one in captions] == [(48, 32), (32, 48)]
    assert [one.pictures["image"].size for one in captions] == [(48, 32), (32, 48)]
    with pytest.raises(UserError, match=r"48 x 32 .* 32 x 48"):
        tiny_model("sd15_img2img").check_pictures(captions)


def test_a_pipeline_that_takes_no_picture_leaves_it_to_the_reward() -> None:
    cond = tiny_model("sd3").encode(texts(ONE), guidance=False)
    assert "image" not in cond.kwargs
    seen: list[Any] = []

    def reward(images: Any, prompts: Any, image: Any) -> list[float]:
        seen.extend(image)
        return [0.0] * len(images)

    load_rewards(reward)([ONE], load_prompts([{"prompt": "red dog", "image": OTHER}]))
    assert seen[0].tobytes() == OTHER.tobytes()


def test_a_run_trains_on_rows_with_pictures(tmp_path: Path) -> None:
    for number, one in enumerate((ONE, OTHER)):
        one.save(tmp_path / f"{number}.png")
    rows = [{"prompt": "red dog", "image": str(tmp_path / f"{n}.png")} for n in (0, 1)]
    given: list[tuple[int, int]] = []

    def difference(images: Any, prompts: Any, image: Any) -> list[float]:
        given.extend(source.size for source in image)
        pairs = zip(images, image, strict=True)
        return [float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()) for a, b in pairs]

    recipe = settings(
        algorithm={"timesteps": {"count": 1, "indices": (0, 1)}},
        rollout={"call": {}},
        lora={"targets": ["to_q", "to_v"]},
        run={"dir": str(tmp_path / "run")},
    )
    trainer = Trainer(build("sd15_img2img"), difference, rows, rows, recipe=recipe)
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    trainer.train()
    assert set(given) == {(32, 32)} and len(given) >= 2 * 8
    after = trainer.policy.parameters()
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
