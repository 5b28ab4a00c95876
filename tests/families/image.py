"""Tiny pipelines that draw pictures."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from families.parts import (
    TEXT,
    TOKENS,
    Tiny,
    assemble,
    bert,
    clip,
    decoder,
    kl_vae,
    language_model,
    network,
    nudge,
    t5,
    tokenizer,
)


def sd3(t5_encoder: bool = True, kind: Any = StableDiffusion3Pipeline) -> Any:
    transformer = network(
        SD3Transformer2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=32,
    )
    pipe = assemble(
        kind,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(),
        text_encoder=clip(32, 16),
        tokenizer=tokenizer(),
        text_encoder_2=clip(32, 16),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5() if t5_encoder else None,
        tokenizer_3=tokenizer() if t5_encoder else None,
    )
    pipe.tokenizer_max_length = TOKENS
    return pipe


def sd3_small() -> StableDiffusion3Pipeline:
    """As the pocket model: no third encoder, and text as wide as both CLIP encoders together."""
    pipe = sd3(t5_encoder=False)
    torch.manual_seed(0)
    config = {**pipe.transformer.config, "joint_attention_dim": 64}
    pipe.register_modules(transformer=nudge(SD3Transformer2DModel.from_config(config)))
    return pipe


UNET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "norm_num_groups": 4,
}
BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def sd15(kind: Any = StableDiffusionPipeline, **config: Any) -> Any:
    return assemble(
        kind,
        unet=network(UNet2DConditionModel, **{**UNET, **config}, attention_head_dim=4),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
        vae=kl_vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    unet = network(
        UNet2DConditionModel,
        **UNET,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return assemble(
        StableDiffusionXLPipeline,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
        vae=kl_vae(),
        text_encoder=clip(16),
        tokenizer=tokenizer(),
        text_encoder_2=clip(16, 16),
        tokenizer_2=tokenizer(),
        add_watermarker=False,
    )


def flux(kind: Any = FluxPipeline, **config: Any) -> Any:
    sizes = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    }
    transformer = network(FluxTransformer2DModel, **{**sizes, **config})
    pipe = assemble(
        kind,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=kl_vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
    )
    pipe.tokenizer_max_length = TOKENS
    return pipe


def sana() -> SanaPipeline:
    transformer = network(
        SanaTransformer2DModel,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=32,
        sample_size=32,
    )
    vae = decoder(
        AutoencoderDC,
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return assemble(
        SanaPipeline,
        transformer=transformer,
        scheduler=scheduler,
        vae=vae,
        text_encoder=language_model("Gemma2"),
        tokenizer=tokenizer(),
    )


def qwen(kind: Any = QwenImagePipeline) -> Any:
    vae = decoder(
        AutoencoderKLQwenImage,
        base_dim=16,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1] * 4,
        latents_std=[1.1] * 4,
    )
    transformer = network(
        QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=32,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        shift_terminal=0.02,
        time_shift_type="exponential",
        max_image_seq_len=8192,
    )
    return assemble(
        kind,
        transformer=transformer,
        scheduler=scheduler,
        vae=vae,
        text_encoder=language_model("Qwen3"),
        tokenizer=tokenizer(1024),
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    transformer = network(
        PixArtTransformer2DModel,
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        use_additional_conditions=False,
    )
    return assemble(
        PixArtSigmaPipeline,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02),
        vae=kl_vae(),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


def hunyuan_dit() -> HunyuanDiTPipeline:
    transformer = network(
        HunyuanDiT2DModel,
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=4,
        hidden_size=24,
        activation_fn="gelu-approximate",
        text_len=77,
        text_len_t5=256,
        # 1.2: neither the picture's size nor its style are inputs
        use_style_cond_and_image_meta_size=False,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.018,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
    )
    return assemble(
        HunyuanDiTPipeline,
        transformer=transformer,
        scheduler=scheduler,
        vae=kl_vae(blocks=4),  # the positions count eight pixels as one
        text_encoder=bert(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        requires_safety_checker=False,
    )


_BINNED = {**TEXT, "use_resolution_binning": False}
_WIDE = {"height": 64, "width": 64, "use_resolution_binning": False}
IMAGE: dict[str, Tiny] = {
    "sd15": Tiny(sd15, fast=True),
    "sdxl": Tiny(sdxl, fast=True),
    "sd3": Tiny(sd3, TEXT, fast=True),
    "flux": Tiny(flux, TEXT, fast=True),
    "qwen": Tiny(qwen, TEXT),
    "sana": Tiny(sana, {**_BINNED, "complex_human_instruction": None}),
    "pixart_sigma": Tiny(pixart_sigma, _BINNED),
    "hunyuan_dit": Tiny(hunyuan_dit, _WIDE),
}
