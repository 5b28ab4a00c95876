"""The parts of the pocket pipeline, untrained: tokenizer, text encoders, transformer, autoencoder.

Every part is a class of ``transformers`` or ``diffusers`` with a small configuration; together they
are a :class:`diffusers.StableDiffusion3Pipeline` of about 2.5 million parameters.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
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
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from dgpo.pocket.scenes import COLORS, NUMBERS, PLURALS, SHAPES

TOKENS = 12
"""Text length: the longest caption of either skill, with its start and end tokens."""
LATENT_CHANNELS = 4
TEXT_WIDTH = 64
SHIFT = 3.0
"""Flow shift of the noise schedule, as Stable Diffusion 3.5's."""
SCENES_SHIFT = 1.5
"""That of the scenes: pictures so small lose less detail to noise, and ten steps with shift 3 spend
too few of them on it (LOG.md)."""

_WORDS = ("a", "photo", "of", "and", "left", "right", "above", "below", "sign", "that", "says")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose words are the captions' own; other text falls back to characters."""
    words = sorted({*_WORDS, *COLORS, *NUMBERS, *SHAPES, *PLURALS.values()})
    merges = _learn_merges(words)
    vocab = [*_LETTERS, *(f"{c}</w>" for c in _LETTERS), *("".join(pair) for pair in merges)]
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    merged: Any = merges  # pairs, as the tokenizer's own files hold them
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=merged,
        model_max_length=TOKENS,
    )


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make every word one token: the most frequent pair first.

    Ties go to the alphabet (the ``tokenizers`` trainer breaks them differently from run to run).
    """
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for pieces in split for pair in pairwise(pieces)):
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((left, right))
        for pieces in split:
            for i in range(len(pieces) - 1):
                if pieces[i : i + 2] == [left, right]:
                    pieces[i : i + 2] = [left + right]
    return merges


def build_text_encoder(tokenizer: CLIPTokenizer, layers: int = 3) -> CLIPTextModelWithProjection:
    """One of the two text encoders.  The pipeline reads the last but one hidden state."""
    ids: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=TEXT_WIDTH // 32,
            max_position_embeddings=TOKENS,
            **ids,
            hidden_act="quick_gelu",
        )
    )
    for name, parameter in encoder.named_parameters():
        if "embedding" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def build_silent_encoder() -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
    """A third text encoder that says nothing: every text becomes padding, every padding zeros.

    The stock pipeline loads from a folder only if the third encoder is there.  This one has no
    layers, so ``max_sequence_length`` zero vectors are appended to the text, which is what the
    pipeline itself does without a third encoder; the transformer is trained to ignore them.
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
    """The denoiser for latents of ``[4, height, width]``; one token for every 2 x 2 latents."""
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
    """The autoencoder: 4 x 4 pixels to one latent of 4 channels, 0.17 million parameters."""
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
    """The pipeline of these parts, in evaluation mode, with a silent third text encoder; ``shift``
    is that of its Euler sampler."""
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
