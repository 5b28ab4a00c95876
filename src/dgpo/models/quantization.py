"""A frozen base in 8 or 4 bits, by bitsandbytes or torchao, with diffusers' own loading."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.quantizers import PipelineQuantizationConfig

from dgpo.errors import MissingExtra, UserError
from dgpo.models.weights.lora_names import DENOISERS

Quantization = Literal["bitsandbytes_4bit", "bitsandbytes_8bit", "torchao_int8"]


def quantized(
    place: str | Path, kind: Quantization, dtype: torch.dtype
) -> PipelineQuantizationConfig:
    """Return the setting with which ``from_pretrained`` rounds the denoisers while it loads them.

    ``bitsandbytes_4bit`` is NF4 with double quantisation (QLoRA, arXiv 2305.14314);
    ``bitsandbytes_8bit`` is LLM.int8 (arXiv 2208.07339); ``torchao_int8`` keeps only the weights in
    8 bits.

    Args:
        place: a pipeline's folder or hub id.
        kind: the recipe's ``memory.quantization``.
        dtype: in which the products are computed.

    Raises:
        MissingExtra: the library is not installed.
        UserError: bitsandbytes without a GPU.
    """
    package = kind.partition("_")[0]
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(package, "quantization")
    if package == "bitsandbytes" and not torch.accelerator.is_available():
        raise UserError(
            f"memory.quantization = {kind!r}: diffusers loads it on a GPU, and there is none; "
            "use torchao_int8, or null"
        )
    index: Any = DiffusionPipeline.load_config(place)
    present = [name for name in DENOISERS if (index.get(name) or [None])[0] is not None]
    return PipelineQuantizationConfig(quant_mapping={n: _settings(kind, dtype) for n in present})


def _settings(kind: Quantization, dtype: torch.dtype) -> Any:
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    if kind == "bitsandbytes_4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if kind == "bitsandbytes_8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

    return TorchAoConfig(Int8WeightOnlyConfig())
