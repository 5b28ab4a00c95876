"""Tiny pipelines that start from a picture."""

from __future__ import annotations

from typing import Any

from diffusers import (
    FluxKontextPipeline,
    QwenImageEditPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    WanImageToVideoPipeline,
)
from PIL import Image

from families.image import flux, qwen, sd3, sd15
from families.parts import SIZE, TEXT, TOKENS, Tiny, normal
from families.video import wan


def picture() -> Image.Image:
    """Neither grey nor its own mirror image."""
    ramp = Image.linear_gradient("L").rotate(90).resize((32, 32))
    return Image.merge("RGB", (ramp, ramp.rotate(90), Image.new("L", (32, 32), 90)))


def sd15_img2img() -> Any:
    return sd15(StableDiffusionImg2ImgPipeline)


def sd3_img2img() -> Any:
    return sd3(kind=StableDiffusion3Img2ImgPipeline)


def flux_kontext() -> Any:
    return flux(FluxKontextPipeline)


def wan_i2v() -> Any:
    # sixteen channels of noise, sixteen of the picture, four of a mask
    pipe = wan(WanImageToVideoPipeline, in_channels=36)
    # to encode, this pipeline wants a package (ftfy) that others can do without
    pipe.register_modules(text_encoder=None, tokenizer=None)
    return pipe


def _wan_embeddings(size: int, seed: int) -> dict[str, Any]:
    return {
        "prompt_embeds": normal(seed, size, TOKENS, 32),
        "negative_prompt_embeds": normal(seed + 1, size, TOKENS, 32),
    }


def qwen_edit() -> Any:
    return qwen(QwenImageEditPipeline)


# the picture would be brought to about a million pixels
_KONTEXT = {**TEXT, "max_area": 32 * 32, "_auto_resize": False}
EDIT: dict[str, Tiny] = {
    "sd15_img2img": Tiny(sd15_img2img, {}, picture=picture),
    "sd3_img2img": Tiny(sd3_img2img, TEXT, picture=picture),
    "flux_kontext": Tiny(flux_kontext, _KONTEXT, picture=picture),
    "wan_i2v": Tiny(
        wan_i2v,
        {**TEXT, "num_frames": 5},
        _wan_embeddings,
        picture=picture,
        without=("prompts",),
    ),
    "qwen_edit": Tiny(qwen_edit, SIZE, picture=picture, refused="looks at the picture"),
}
