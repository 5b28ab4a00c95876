"""Tiny pipelines that draw pictures by flow matching, of later years."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    AutoencoderKLFlux2,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from families.parts import (
    SIZE,
    TEXT,
    TOKENS,
    Tiny,
    assemble,
    decoder,
    kl_vae,
    language_model,
    network,
    t5,
    tokenizer,
)


def zimage() -> ZImagePipeline:
    transformer = network(
        ZImageTransformer2DModel,
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return assemble(
        ZImagePipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(),
        text_encoder=language_model("Qwen3"),
        tokenizer=tokenizer(),
    )


def _flux2(kind: Any, guidance_embeds: bool, **components: Any) -> Any:
    transformer = network(
        Flux2Transformer2DModel,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=guidance_embeds,
    )
    vae = decoder(
        AutoencoderKLFlux2,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return assemble(kind, transformer=transformer, scheduler=scheduler, vae=vae, **components)


def flux2() -> Flux2Pipeline:
    return _flux2(
        Flux2Pipeline, True, text_encoder=language_model("Mistral"), tokenizer=tokenizer(64)
    )


def flux2_klein() -> Flux2KleinPipeline:
    return _flux2(
        Flux2KleinPipeline, False, text_encoder=language_model("Qwen3"), tokenizer=tokenizer()
    )


def lumina2() -> Lumina2Pipeline:
    transformer = network(
        Lumina2Transformer2DModel,
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=32,
    )
    return assemble(
        Lumina2Pipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=kl_vae(4),
        text_encoder=language_model("Gemma2"),
        tokenizer=tokenizer(),
    )


def cogview4() -> CogView4Pipeline:
    transformer = network(
        CogView4Transformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25,
        max_shift=0.75,
        base_image_seq_len=256,
        use_dynamic_shifting=True,
        time_shift_type="linear",
    )
    return assemble(
        CogView4Pipeline,
        transformer=transformer,
        scheduler=scheduler,
        vae=kl_vae(),
        text_encoder=language_model("Glm"),
        tokenizer=tokenizer(64),
    )


def chroma() -> ChromaPipeline:
    transformer = network(
        ChromaTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return assemble(
        ChromaPipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(),
        text_encoder=t5(),
        tokenizer=tokenizer(),
    )


def auraflow() -> AuraFlowPipeline:
    transformer = network(
        AuraFlowTransformer2DModel,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    return assemble(
        AuraFlowPipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=kl_vae(),
        text_encoder=t5(multilingual=True),
        tokenizer=tokenizer(),
    )


def longcat() -> LongCatImagePipeline:
    """Takes embeddings, and cannot do without the text."""
    transformer = network(
        LongCatImageTransformer2DModel,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    vae = decoder(
        AutoencoderKL,
        latent_channels=16,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.06,
    )
    pipe = assemble(
        LongCatImagePipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=language_model("Qwen2"),
        tokenizer=tokenizer(),
    )
    pipe.tokenizer_max_length = TOKENS
    return pipe


# the encoder's inner layers that are read: the defaults are those of encoders of 30 layers
_LAYERS = {**TEXT, "max_sequence_length": 64, "text_encoder_out_layers": (1, 2)}
IMAGE_FLOW: dict[str, Tiny] = {
    "zimage": Tiny(zimage, TEXT),
    "flux2": Tiny(flux2, _LAYERS, without=("guidance",)),
    "flux2_klein": Tiny(flux2_klein, _LAYERS),
    "lumina2": Tiny(lumina2, {"height": 64, "width": 64, "max_sequence_length": 3 * TOKENS}),
    "cogview4": Tiny(cogview4, {**SIZE, "max_sequence_length": 64}),
    "chroma": Tiny(chroma, TEXT),
    "auraflow": Tiny(auraflow, TEXT),
    "longcat": Tiny(longcat, {**SIZE, "enable_prompt_rewrite": False}),
}
