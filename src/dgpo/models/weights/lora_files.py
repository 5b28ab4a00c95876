"""Files of a LoRA, as ``pipe.load_lora_weights`` or peft reads them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import peft
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dgpo.errors import UserError
from dgpo.models.weights.lora import ADAPTER

_SECOND = "transformer_2"
_PEFT_FILE = "adapter_model.safetensors"


def save(pipe: Any, denoisers: Mapping[str, nn.Module], folder: Path) -> None:
    """Write the LoRA of every denoiser; see :meth:`dgpo.models.policy.Policy.save`."""
    save_weights = getattr(type(pipe), "save_lora_weights", None)
    for name, denoiser in denoisers.items():
        place = folder / name if name == _SECOND else folder
        place.mkdir(exist_ok=True)
        weights = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
        # safetensors writes contiguous tensors only
        weights = {key: value.detach().contiguous() for key, value in weights.items()}
        # peft holds names in sets, which every process orders differently
        config = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in vars(denoiser)["peft_config"][ADAPTER].to_dict().items()
        }
        if save_weights is None:
            _save_for_peft(weights, config, place)
            continue
        stem = "unet" if name == "unet" else "transformer"
        arguments: dict[str, Any] = {f"{stem}_lora_layers": weights}
        if (key := f"{stem}_lora_adapter_metadata") in inspect.signature(save_weights).parameters:
            arguments[key] = config
        save_weights(place, **arguments)


def load(pipe: Any, folder: Path) -> Literal["diffusers", "peft"]:
    """Put a saved LoRA into a pipeline, the LoRA of a second expert included.

    Returns:
        What read it: ``load_lora_weights`` of the pipeline, or peft where it has none.

    Raises:
        UserError: the folder holds a LoRA that was written for the other of the two.
    """
    # the file tells who wrote it: peft where the pipeline has no loader
    by_peft = (folder / _PEFT_FILE).is_file()
    if by_peft == hasattr(pipe, "load_lora_weights"):
        raise UserError(f"{folder}: not a LoRA that {type(pipe).__name__} can read")
    if not by_peft:
        pipe.load_lora_weights(folder)
        if (folder / _SECOND).is_dir():
            pipe.load_lora_weights(folder / _SECOND, load_into_transformer_2=True)
        return "diffusers"
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(str(folder)), denoiser, ADAPTER)
    set_peft_model_state_dict(denoiser, load_file(folder / _PEFT_FILE), ADAPTER)
    return "peft"


def _save_for_peft(weights: dict[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Write the two files that peft's own tools read, for pipelines without a LoRA loader
    (PixArt)."""
    save_file(weights, str(folder / _PEFT_FILE))
    text = json.dumps(config, indent=2, default=str)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def lora_folder(given: Path) -> Path:
    """Return the folder that holds a LoRA: the one given, or ``lora`` in it.

    Raises:
        UserError: neither holds one.
    """
    for folder in (given, given / "lora"):
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            return folder
    what = "holds no LoRA (*.safetensors)" if given.is_dir() else "is no folder"
    raise UserError(f"--lora {given}: it {what}; give a run folder or its lora/")
