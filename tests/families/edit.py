"""Tiny pipelines that start from a picture."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXImageToVideoPipeline,
    FluxFillPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    WanImageToVideoPipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers import BatchFeature, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from families.image import flux, qwen, sd3, sd15
from families.parts import SIZE, TEXT, TOKENS, VOCABULARY, Tiny, normal, tokenizer
from families.video import VIDEO, cogvideox, wan


def picture() -> Image.Image:
    """Neither grey nor its own mirror image."""
    ramp = Image.linear_gradient("L").rotate(90).resize((32, 32))
    return Image.merge("RGB", (ramp, ramp.rotate(90), Image.new("L", (32, 32), 90)))


def mask() -> Image.Image:
    """White, where it is painted, in one corner."""
    made = Image.new("L", (32, 32))
    made.paste(255, (12, 4, 28, 20))
    return made


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


def cogvideox_i2v() -> Any:
    """Wants a picture for each row, and looks at a draw of what its VAE makes of it."""
    # four channels of noise, four of the picture
    return cogvideox(CogVideoXImageToVideoPipeline, channels=8)


def sd15_inpaint() -> Any:
    # four channels of noise, one of the mask, four of the picture around it
    return sd15(StableDiffusionInpaintPipeline, in_channels=9)


def flux_fill() -> Any:
    # sixteen channels of noise, sixteen of the picture around the mask, sixteen of the mask
    return flux(FluxFillPipeline, in_channels=48, out_channels=16)


def flux_inpaint() -> Any:
    """Puts the picture back around the mask after every step."""
    return flux(FluxInpaintPipeline)


class PatchProcessor:
    """Makes of a text and a picture what Qwen2.5-VL reads: four patches and a token for them. The
    library's own processor wants torchvision."""

    def __init__(self) -> None:
        self._words = tokenizer(1024)

    def __call__(self, text: list[str], images: Any, **_: Any) -> BatchFeature:
        words = self._words(text, return_tensors="pt")
        marks = torch.full((len(text), 1), IMAGE_TOKEN)
        image = images[0] if isinstance(images, list) else images
        small = image.resize((28, 28)).convert("RGB")
        pixels = (
            torch.as_tensor(list(small.tobytes()), dtype=torch.float32).reshape(28, 28, 3) / 255
        )
        # [row of patches, row, column of patches, column, colour] to [patch, colour, frame, ...]
        patches = pixels.reshape(2, 14, 2, 14, 3).permute(0, 2, 4, 1, 3).reshape(4, 3, 1, 196)
        return BatchFeature(
            {
                "input_ids": torch.cat([marks, words.input_ids], 1),
                "attention_mask": torch.cat([torch.ones_like(marks), words.attention_mask], 1),
                "pixel_values": patches.expand(-1, -1, 2, -1).reshape(4, -1),
                "image_grid_thw": torch.tensor([[1, 2, 2]]),
            }
        )


def qwen_vl() -> Any:
    torch.manual_seed(11)
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    sight = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=sight, image_token_id=IMAGE_TOKEN, vision_start_token_id=30
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_edit(kind: Any = QwenImageEditPipeline) -> Any:
    # the picture would be brought to a million pixels
    vars(pipeline_qwenimage_edit)["calculate_dimensions"] = lambda area, ratio: (32, 32, None)
    pipe = qwen(kind)
    vars(pipe)["processor"] = PatchProcessor()
    pipe.register_modules(text_encoder=qwen_vl())
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    return pipe


def qwen_edit_plus() -> Any:
    """Takes several pictures, and shows the text encoder other ones than the denoiser."""
    vars(pipeline_qwenimage_edit_plus)["calculate_dimensions"] = lambda area, ratio: (32, 32)
    vars(pipeline_qwenimage_edit_plus)["VAE_IMAGE_SIZE"] = 32 * 32
    return qwen_edit(QwenImageEditPlusPipeline)


IMAGE_TOKEN = 31


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
    "cogvideox_i2v": Tiny(
        cogvideox_i2v,
        VIDEO["cogvideox"].call,
        no_sde=VIDEO["cogvideox"].no_sde,
        picture=picture,
    ),
    "sd15_inpaint": Tiny(sd15_inpaint, SIZE, picture=picture, mask=mask),
    "flux_fill": Tiny(flux_fill, TEXT, picture=picture, mask=mask, without=("guidance",)),
    "qwen_edit": Tiny(qwen_edit, SIZE, picture=picture),
    "qwen_edit_plus": Tiny(qwen_edit_plus, SIZE, picture=picture),
}
