"""Tiny random pipelines of diffusers, made in code: no download, a second to build.

``build(name)`` gives the pipeline; ``TINY[name]`` also says how big a picture to ask for. All have
real, if tiny, text encoders with a word-level tokenizer where the encoder allows it; the others
are given random embeddings by ``conditioning``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from dgpo.models.text import Conditioning

WORDS = ["a", "photo", "of", "cat", "dog", "red", "blue", "house", "the", "on"]
WORDS += ["table", "small", "big"]
TOKENS = 16
VOCABULARY = 32


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nudge(module: nn.Module) -> Any:
    """Give zero-initialised parameters values: a denoiser that answers zero would prove nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.numel() and not parameter.detach().any():
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TOKENS,
    )


def clip(hidden: int = 32, projection: int | None = None) -> Any:
    torch.manual_seed(7)
    config = CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        hidden_size=hidden,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        projection_dim=projection or hidden,
    )
    kind = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    return kind(config).eval()


def t5(multilingual: bool = False) -> Any:
    torch.manual_seed(8)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2}
    if multilingual:
        return UMT5EncoderModel(UMT5Config(**sizes, num_heads=4)).eval()
    return T5EncoderModel(T5Config(**sizes, num_heads=4)).eval()


def kl_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        scaling_factor=1.5,
        shift_factor=0.06,
    ).eval()


def sd3(t5_encoder: bool = True) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
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
    pipe = StableDiffusion3Pipeline(
        transformer=nudge(transformer),
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


_UNET: dict[str, Any] = {
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
_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def sd15() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**_UNET, attention_head_dim=4)
    return StableDiffusionPipeline(
        unet=nudge(unet),
        scheduler=DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False),
        vae=kl_vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **_UNET,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return StableDiffusionXLPipeline(
        unet=nudge(unet),
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading"),
        vae=kl_vae(),
        text_encoder=clip(16),
        tokenizer=tokenizer(),
        text_encoder_2=clip(16, 16),
        tokenizer_2=tokenizer(),
        add_watermarker=False,
    )


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    pipe = FluxPipeline(
        transformer=nudge(transformer),
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
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    vae = AutoencoderDC(
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
    return SanaPipeline(
        transformer=nudge(transformer),
        scheduler=scheduler,
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
    )


def wan() -> WanPipeline:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return WanPipeline(
        transformer=nudge(transformer),
        scheduler=scheduler,
        vae=vae.eval(),
        text_encoder=t5(multilingual=True),
        tokenizer=tokenizer(),
    )


def qwen() -> QwenImagePipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1] * 4,
        latents_std=[1.1] * 4,
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
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
    return QwenImagePipeline(
        transformer=nudge(transformer),
        scheduler=scheduler,
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
    )


def zimage() -> ZImagePipeline:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return ZImagePipeline(
        transformer=nudge(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(),
        text_encoder=None,
        tokenizer=None,
    )


def _sana_embeddings(size: int, seed: int) -> dict[str, Any]:
    mask = torch.ones(size, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return {
        "prompt_embeds": normal(seed, size, 7, 8),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": normal(seed + 1, size, 7, 8),
        "negative_prompt_attention_mask": torch.ones(size, 7, dtype=torch.long),
    }


def _qwen_embeddings(size: int, seed: int) -> dict[str, Any]:
    mask = torch.ones(size, 9, dtype=torch.long)
    mask[0, 6:] = 0
    return {
        "prompt_embeds": normal(seed, size, 9, 16),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": normal(seed + 1, size, 5, 16),
        "negative_prompt_embeds_mask": torch.ones(size, 5, dtype=torch.long),
    }


def _zimage_embeddings(size: int, seed: int) -> dict[str, Any]:
    return {
        "prompt_embeds": [normal(seed + i, 5 + i, 16) for i in range(size)],
        "negative_prompt_embeds": [normal(seed + 50, 4, 16) for _ in range(size)],
    }


@dataclass(frozen=True)
class Tiny:
    """How to build a tiny pipeline, how to call it, and its embeddings if it cannot encode."""

    pipeline: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=lambda: {"height": 32, "width": 32})
    embeddings: Callable[[int, int], dict[str, Any]] | None = None


_SIZE = {"height": 32, "width": 32}
_TEXT = {**_SIZE, "max_sequence_length": TOKENS}
TINY: dict[str, Tiny] = {
    "sd3": Tiny(sd3, _TEXT),
    "sd15": Tiny(sd15),
    "sdxl": Tiny(sdxl),
    "flux": Tiny(flux, _TEXT),
    "sana": Tiny(sana, {**_SIZE, "use_resolution_binning": False}, _sana_embeddings),
    "wan": Tiny(wan, {**_TEXT, "num_frames": 5}),
    "qwen": Tiny(qwen, _SIZE, _qwen_embeddings),
    "zimage": Tiny(zimage, _SIZE, _zimage_embeddings),
}
_PROMPTS = ("a photo of cat", "red dog on the small blue house", "big table", "the cat")


def build(name: str) -> Any:
    """The tiny pipeline called ``name``, the same one every time."""
    return TINY[name].pipeline()


def conditioning(name: str, model: Any, size: int = 2, seed: int = 10) -> Conditioning:
    """Conditioning with a negative prompt, from prompts or from random embeddings."""
    make = TINY[name].embeddings
    if make is None:
        return model.encode([_PROMPTS[i % len(_PROMPTS)] for i in range(size)], guidance=True)
    return Conditioning(make(size, seed), size)
