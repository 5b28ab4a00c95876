"""Tiny pipelines that make films."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance

from families.parts import (
    TEXT,
    TOKENS,
    Tiny,
    assemble,
    clip,
    decoder,
    language_model,
    network,
    t5,
    tokenizer,
)


def _wan_transformer(seed: int, **config: Any) -> WanTransformer3DModel:
    sizes = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 64,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return network(WanTransformer3DModel, seed, **{**sizes, **config})


def wan(kind: Any = WanPipeline, second: bool = False, **config: Any) -> Any:
    """Wan 2.1; with ``second`` the two experts of 2.2."""
    vae = decoder(
        AutoencoderKLWan,
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return assemble(
        kind,
        transformer=_wan_transformer(0, **config),
        transformer_2=_wan_transformer(1, **config) if second else None,
        boundary_ratio=0.875 if second else None,
        scheduler=scheduler,
        vae=vae,
        text_encoder=t5(multilingual=True),
        tokenizer=tokenizer(),
    )


def wan22() -> WanPipeline:
    return wan(second=True)


def ltx() -> LTXPipeline:
    transformer = network(
        LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    vae = decoder(
        AutoencoderKLLTXVideo,
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return assemble(
        LTXPipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


def cogvideox(kind: Any = CogVideoXPipeline, channels: int = 4) -> Any:
    transformer = network(
        CogVideoXTransformer3DModel,
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TOKENS,
    )
    vae = decoder(
        AutoencoderKLCogVideoX,
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )
    return assemble(
        kind,
        transformer=transformer,
        scheduler=scheduler,
        vae=vae,
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


def hunyuan_video() -> HunyuanVideoPipeline:
    transformer = network(
        HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(2, 4, 4),
    )
    vae = decoder(
        AutoencoderKLHunyuanVideo,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.476,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=True,
    )
    return assemble(
        HunyuanVideoPipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=vae,
        text_encoder=language_model("Llama"),
        tokenizer=tokenizer(256),
        text_encoder_2=clip(positions=77),
        tokenizer_2=tokenizer(),
    )


def hunyuan_video15(guider: Any = None) -> HunyuanVideo15Pipeline:
    """Its guidance is set in a guider, and not in its call."""
    transformer = network(
        HunyuanVideo15Transformer3DModel,
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=32,
        text_embed_2_dim=32,
        image_embed_dim=8,
        rope_axes_dim=(2, 4, 4),
        target_size=16,
    )
    pipe = assemble(
        HunyuanVideo15Pipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=guider or ClassifierFreeGuidance(guidance_scale=6.0),
        vae=hunyuan_video().vae,
        text_encoder=language_model("Qwen2"),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
    )
    pipe.system_message, pipe.prompt_template_encode_start_idx = "", 0
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = TOKENS, 4
    pipe.vision_num_semantic_tokens = 4
    return pipe


def mochi() -> MochiPipeline:
    transformer = network(
        MochiTransformer3DModel,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=TOKENS,
    )
    vae = decoder(
        AutoencoderKLMochi,
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    return assemble(
        MochiPipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


_SMALL = {"height": 16, "width": 16, "max_sequence_length": TOKENS}
VIDEO: dict[str, Tiny] = {
    "wan": Tiny(wan, {**TEXT, "num_frames": 5}, fast=True),
    "wan22": Tiny(wan22, {**TEXT, "num_frames": 5}),
    "ltx": Tiny(ltx, {**TEXT, "num_frames": 9}),
    "cogvideox": Tiny(
        cogvideox, {**_SMALL, "num_frames": 8}, no_sde="cannot carry snr_shift_scale", fast=True
    ),
    "hunyuan_video": Tiny(hunyuan_video, {**_SMALL, "num_frames": 9}),
    "hunyuan_video15": Tiny(hunyuan_video15, {"height": 16, "width": 16, "num_frames": 5}),
    "mochi": Tiny(mochi, {**_SMALL, "num_frames": 19}, no_sde="inverted sigmas"),
}
