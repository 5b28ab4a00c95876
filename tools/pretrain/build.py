"""The pocket pipeline is built here of untrained parts: transformer, autoencoder, text encoders.

Every part is a class of ``transformers`` or ``diffusers`` with a small configuration; together they
are a :class:`diffusers.StableDiffusion3Pipeline` of about 2.5 million parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Regex, Tokenizer, models, normalizers
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from dgpo.pocket.text import TEXT_WIDTH

LATENT_CHANNELS = 4
SHIFT = 3.0
"""The flow shift of the noise schedule, the one of Stable Diffusion 3.5."""
SCENES_SHIFT = 1.5
"""The flow shift for the scenes: pictures so small lose less detail to noise, and ten steps with
shift 3 spend too few of them on it (LOG.md)."""


def build_silent_encoder() -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
    """Build a third text encoder that says nothing: every text becomes padding, and padding zeros.

    The stock pipeline loads from a folder only if the third encoder is there. This one has no
    layers, so it appends ``max_sequence_length`` zero vectors to the text, as the pipeline itself
    does without a third encoder; the transformer is trained to ignore them.
    """
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]"), "")
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=1,
            d_model=2 * TEXT_WIDTH,
            d_kv=1,
            d_ff=1,
            num_layers=0,
            num_heads=1,
            pad_token_id=0,
            eos_token_id=0,
        )
    )
    torch.nn.init.zeros_(encoder.get_input_embeddings().weight)
    stock = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    return stock, encoder


def build_transformer(
    height: int, width: int, hidden: int = 128, layers: int = 4
) -> SD3Transformer2DModel:
    """Build the denoiser for latents of ``[4, height, width]``, with a token for 2 x 2 latents."""
    return SD3Transformer2DModel(
        sample_size=max(height, width),
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=hidden // 32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=hidden,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=max(height, width) // 2,
        qk_norm="rms_norm",
    )


def build_vae() -> AutoencoderKL:
    """Build the autoencoder: 4 x 4 pixels a latent of 4 channels, 0.17 million parameters."""
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 16, 32),
    }
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        **blocks,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def assemble(
    tokenizer: CLIPTokenizer,
    text_encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection],
    transformer: SD3Transformer2DModel,
    vae: AutoencoderKL,
    shift: float = SHIFT,
) -> StableDiffusion3Pipeline:
    """Make a pipeline of the parts, in evaluation mode, with a silent third text encoder.

    ``shift`` is the flow shift of its Euler sampler.
    """
    tokenizer_3, text_encoder_3 = build_silent_encoder()
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae.eval(),
        text_encoder=text_encoders[0].eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoders[1].eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3.eval(),
        tokenizer_3=tokenizer_3,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
