"""Tiny pipelines that make sound, those among them that dgpo refuses included."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AudioLDM2Pipeline,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
)
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from families.image import BETAS, UNET
from families.parts import Tiny, assemble, decoder, language_model, network, normal, t5, tokenizer


def audioldm2() -> AudioLDM2Pipeline:
    torch.manual_seed(3)
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )
    # in each block one attention to the sound itself, one to the generated text, one to T5's
    unet = {**UNET, "cross_attention_dim": ((None, 8, 16),) * 2}
    return assemble(
        AudioLDM2Pipeline,
        unet=network(AudioLDM2UNet2DConditionModel, **unet),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
        vae=decoder(
            AutoencoderKL,
            in_channels=1,
            out_channels=1,
            latent_channels=4,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        # asked for their precision alone: the embeddings are given
        text_encoder_2=t5(),
        language_model=language_model("Llama"),
        vocoder=SpeechT5HifiGan(vocoder).eval(),
    )


def _audioldm2_embeddings(size: int, seed: int) -> dict[str, Any]:
    mask = torch.ones(size, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return {
        "prompt_embeds": normal(seed, size, 7, 16),
        "attention_mask": mask,
        "generated_prompt_embeds": normal(seed + 1, size, 4, 8),
        "negative_prompt_embeds": normal(seed + 2, size, 7, 16),
        "negative_attention_mask": torch.ones(size, 7, dtype=torch.long),
        "negative_generated_prompt_embeds": normal(seed + 3, size, 4, 8),
    }


def stable_audio() -> StableAudioPipeline:
    transformer = network(
        StableAudioDiTModel,
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    return assemble(
        StableAudioPipeline,
        transformer=transformer,
        # its own, CosineDPMSolverMultistep, is this one with other sigmas and wants torchsde
        scheduler=EDMDPMSolverMultistepScheduler(prediction_type="v_prediction"),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


def ace_step() -> AceStepPipeline:
    transformer = network(
        AceStepTransformer1DModel,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
    )
    return assemble(
        AceStepPipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


AUDIO: dict[str, Tiny] = {
    "audioldm2": Tiny(
        audioldm2, {"audio_length_in_s": 0.004}, _audioldm2_embeddings, without=("prompts",)
    ),
    "stable_audio": Tiny(stable_audio, {}, refused="EDMDPMSolverMultistepScheduler"),
    "ace_step": Tiny(ace_step, {}, refused="no prompt_embeds"),
}
