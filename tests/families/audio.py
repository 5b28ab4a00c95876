"""Tiny pipelines that make sound."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AudioLDM2Pipeline,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    AutoencoderOobleck,
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
)
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
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
        scheduler=CosineDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=50),
        text_encoder=t5(),
        tokenizer=tokenizer(),
        projection_model=network(
            StableAudioProjectionModel,
            text_encoder_dim=32,
            conditioning_dim=4,
            min_value=0,
            max_value=8,
        ),
        vae=oobleck(3),
    )


def oobleck(latents: int, rate: int = 16000) -> AutoencoderOobleck:
    """A stereo autoencoder of 4 samples a latent."""
    return decoder(
        AutoencoderOobleck,
        encoder_hidden_size=latents,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=latents,
        audio_channels=2,
        sampling_rate=rate,
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
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        vae=oobleck(4, rate=40),  # it listens to thirty seconds of silence
        text_encoder=language_model("Qwen3"),
        tokenizer=tokenizer(64),
        condition_encoder=network(
            AceStepConditionEncoder,
            hidden_size=16,
            intermediate_size=16,
            text_hidden_dim=32,
            timbre_hidden_dim=4,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        ),
    )


AUDIO: dict[str, Tiny] = {
    "audioldm2": Tiny(
        audioldm2, {"audio_length_in_s": 0.004}, _audioldm2_embeddings, without=("prompts",)
    ),
    "stable_audio": Tiny(
        stable_audio, {"audio_end_in_s": 0.001}, no_sde="does not know the noise levels"
    ),
    "ace_step": Tiny(ace_step, {"audio_duration": 0.4}, without=("guidance",)),
}
