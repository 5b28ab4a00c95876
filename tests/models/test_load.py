"""The ``model`` of a recipe: a name, a folder, or a clear refusal."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dgpo.errors import UserError
from dgpo.models.load import check_vae, load_pipeline
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.self_check import self_check
from dgpo.prompts.caption import Caption
from families.edit import picture
from families.tiny import TINY, build, conditioning


def test_a_saved_pipeline_comes_back(tmp_path: Path) -> None:
    pipe = build("sd15")
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(str(tmp_path))
    assert type(loaded) is type(pipe)
    before, after = (PipelineModel(p, call=TINY["sd15"].call) for p in (pipe, loaded))
    a, b = (
        m.rollout(
            conditioning("sd15", m),
            steps=2,
            generators=[torch.Generator().manual_seed(i) for i in range(2)],
            decode=False,
        ).x0
        for m in (before, after)
    )
    torch.testing.assert_close(a, b)
    half = load_pipeline(str(tmp_path), "bfloat16")
    assert next(half.unet.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["sd3", "sd15_img2img", "wan"])
def test_a_vae_of_its_own_precision(name: str, tmp_path: Path) -> None:
    own = build(name)
    own.save_pretrained(tmp_path)
    pipe = load_pipeline(str(tmp_path), "bfloat16", vae_precision="float32")
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            found = {p.dtype for p in module.parameters()}
            # of Wan's denoiser a part stays in float32
            assert found == {torch.float32} if part == "vae" else torch.bfloat16 in found, part
    # read in its precision, not rounded and widened
    for key, weight in own.vae.state_dict().items():
        assert torch.equal(pipe.vae.state_dict()[key], weight), key
    model = PipelineModel(pipe, call=TINY[name].call)
    given = [Caption(text, {"image": picture()}) for text in ("red dog", "a photo of cat")]
    cond = model.encode(given, guidance=True)
    assert self_check(model, cond).ok
    generators = [torch.Generator().manual_seed(row) for row in range(2)]
    made = model.rollout(cond, steps=3, generators=generators)
    assert made.images is not None and len(made.images) == 2
    if name == "sd3":
        x0 = made.x0.float() / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        with torch.no_grad():
            decoded = pipe.vae.decode(x0).sample
        wanted = pipe.image_processor.postprocess(decoded, output_type="pil")
        pairs = zip(made.images, wanted, strict=True)
        # the pipeline shifts and scales in half precision before the VAE sees anything
        apart = [np.abs(np.asarray(a, float) - np.asarray(b, float)).max() for a, b in pairs]
        assert max(apart) <= 2


def test_a_precision_for_a_vae_that_is_made_or_missing() -> None:
    made = load_pipeline("families.tiny:sd15", "bfloat16", vae_precision="float32")
    assert made.vae.dtype == torch.float32 and made.unet.dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"memory\.vae_precision.*: 'fp16' is not one of float32"):
        load_pipeline("families.tiny:sd15", vae_precision="fp16")
    made.register_modules(vae=None)
    with pytest.raises(UserError, match=r"memory\.vae_precision = 'float32'.*has no vae"):
        check_vae(made, torch.float32)
    with pytest.raises(UserError, match=r"one in torch\.float32; use pipe\.vae\.to"):
        check_vae(build("sd15"), torch.bfloat16)


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").touch()
    with pytest.raises(UserError) as caught:
        load_pipeline(str(tmp_path))
    for word in ("model_index.json", "adapter.safetensors", "save_pretrained"):
        assert word in str(caught.value)


def _broken_index(folder: Path) -> str:
    (folder / "model_index.json").write_text("{")
    return "not a valid JSON"


def _unknown_class(folder: Path) -> str:
    (folder / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    return "NoSuchPipeline"


def _weights_gone(folder: Path) -> str:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return "diffusion_pytorch_model"


def _weights_cut_short(folder: Path) -> str:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return "diffusion_pytorch_model|[Hh]eader"


@pytest.mark.parametrize(
    "spoil", [_broken_index, _unknown_class, _weights_gone, _weights_cut_short]
)
def test_a_broken_folder_is_named_with_what_is_wrong(
    spoil: Callable[[Path], str], tmp_path: Path
) -> None:
    build("sd15").save_pretrained(tmp_path)
    word = spoil(tmp_path)
    with pytest.raises(
        UserError, match=f"(?s){re.escape(str(tmp_path))}.*({word}).*save_pretrained"
    ):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize("name", ["poket", "./nowhere", "a/b/c", "~/none"])
def test_what_is_neither_folder_nor_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="pocket"):
        load_pipeline(name)


def test_a_function_of_the_users_own(tmp_path: Path) -> None:
    made = load_pipeline("families.tiny:sd15")
    assert type(made).__name__ == "StableDiffusionPipeline"
    with pytest.raises(UserError):
        load_pipeline("families.tiny:no_such_pipeline")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match=r"'fp16'.*bfloat16"):
        load_pipeline("pocket", "fp16")
