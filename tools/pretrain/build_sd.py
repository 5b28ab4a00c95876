"""The noise-prediction pocket is a :class:`diffusers.StableDiffusionPipeline` of the same parts.

It takes the tokenizer, the text encoder and the autoencoder of the other pocket. Its denoiser is a
:class:`diffusers.UNet2DConditionModel` that predicts the noise, as in Stable Diffusion 1.5.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dgpo.pocket.text import TEXT_WIDTH
from tools.pretrain.build import LATENT_CHANNELS

UNET_CHANNELS = (32, 96)


def build_unet(
    height: int, width: int, channels: tuple[int, int] = UNET_CHANNELS
) -> UNet2DConditionModel:
    """Build the denoiser for latents of ``[4, height, width]``, with 2.0 million parameters.

    It has two resolutions; at the lower one four layers of attention read the text.
    """
    blocks: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": channels,
        # of heads, whatever the name says; the width of a head is 32
        "attention_head_dim": (1, channels[1] // 32),
    }
    return UNet2DConditionModel(
        sample_size=max(height, width),
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        **blocks,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )


@torch.no_grad()
def reading_encoder(encoder: CLIPTextModelWithProjection) -> CLIPTextModel:
    """Return the text encoder without its last layer, so that it ends where the other pocket reads.

    Stable Diffusion 3 reads the last but one hidden state, Stable Diffusion 1.5 the last, normed.
    """
    config: Any = type(encoder.config).from_dict(
        {
            **encoder.config.to_dict(),
            "num_hidden_layers": encoder.config.num_hidden_layers - 1,
            "architectures": ["CLIPTextModel"],
        }
    )
    made = CLIPTextModel(config)
    theirs = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    for name, value in made.state_dict().items():
        key = name.removeprefix("text_model.")
        # the norm was taught for the last layer's output; this one only sets the scale
        if not key.startswith("final_layer_norm"):
            value.copy_(theirs[key])
    return made.requires_grad_(False)


def noise_schedule() -> PNDMScheduler:
    """Return the schedule and sampler of Stable Diffusion 1.5: PLMS with scaled linear betas."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def assemble_sd(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
) -> StableDiffusionPipeline:
    """Make a pipeline of the parts, in evaluation mode.

    The autoencoder's latents are scaled and not shifted, because this pipeline knows no shift.
    """
    vae.register_to_config(shift_factor=None)
    parts: Any = {
        "scheduler": noise_schedule(),
        "safety_checker": None,
        "feature_extractor": None,
    }
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        **parts,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
