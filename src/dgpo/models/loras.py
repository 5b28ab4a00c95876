"""The one loader of LoRAs: it reads what any trainer has written, and says what of it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn

from dgpo.errors import UserError
from dgpo.models.lora_fitting import AdaptedLayer, fit
from dgpo.models.weights.lora import ADAPTER, refuse_adapted
from dgpo.models.weights.lora_files import LoraFile, read
from dgpo.models.weights.lora_names import DENOISERS


def load_lora(pipe: Any, given: str | Path, *, weight: float = 1.0) -> str:
    """Put a LoRA into a pipeline, whatever trainer has written it.

    It reads files of diffusers, peft, kohya's scripts, ComfyUI and ai-toolkit, run folders and
    checkpoints. What is for text encoders is left out.

    Args:
        pipe: a diffusers pipeline without a LoRA.
        given: a file, a folder with one, a run, its ``lora/``, or one of its checkpoints.
        weight: the LoRA's strength.

    Returns:
        A sentence that says how many tensors fit, and what is left out.

    Raises:
        UserError: nothing fits, something has other widths or is damaged, the LoRA is of another
            type, or it changes nothing; the pipeline is as it was.
    """
    return put_lora(pipe, read(Path(given).expanduser()), weight=weight)


def put_lora(
    pipe: Any, lora: LoraFile, *, weight: float = 1.0, fresh: bool = False, merge: bool = False
) -> str:
    """Put a LoRA that was read into a pipeline, as :func:`load_lora` does.

    Args:
        pipe: a diffusers pipeline without a LoRA.
        lora: what stands in the files.
        weight: the LoRA's strength.
        fresh: whether a LoRA that changes nothing is taken, as it is when training starts.
        merge: whether to add it to the weights for good, so that it costs no time. The sum is made
            in float32 and rounded once.

    Raises:
        UserError: it cannot be used, for a reason of :func:`load_lora`.
    """
    denoisers, fitting, said = _prepared(pipe, lora, weight, fresh)
    for name, layers in fitting.items():
        (_add if merge else _inject)(denoisers[name], layers)
    return said


@torch.no_grad()
def _add(denoiser: nn.Module, layers: Mapping[str, AdaptedLayer]) -> None:
    for name, layer in layers.items():
        weight: Any = denoiser.get_submodule(name).weight
        change = layer.change().reshape(weight.shape).to(weight.device)
        weight.copy_(weight.float() + change)


def _prepared(
    pipe: Any, lora: LoraFile, weight: float, fresh: bool
) -> tuple[dict[str, nn.Module], dict[str, dict[str, AdaptedLayer]], str]:
    """Return the denoisers, the layers that fit them, and a sentence; change nothing."""
    parts = {name: getattr(pipe, name, None) for name in DENOISERS}
    denoisers = {name: m for name, m in parts.items() if isinstance(m, nn.Module)}
    if not denoisers:
        raise UserError(f"LoRA {lora.place}: {type(pipe).__name__} has no denoiser for it")
    refuse_adapted(denoisers)
    try:
        fitting, said = fit(pipe, lora, denoisers)
        found = [
            (denoisers[name].get_submodule(key), layer)
            for name, layers in fitting.items()
            for key, layer in layers.items()
        ]
        for _, layer in found:
            layer.alpha *= weight
        if not fresh and not any(_changes(module, layer) for module, layer in found):
            raise UserError(f"it changes nothing: {_why_nothing([layer for _, layer in found])}")
    except UserError as error:
        raise UserError(f"LoRA {lora.place}: {error}") from error
    return denoisers, fitting, f"LoRA {lora.place}: {said}"


def _changes(module: nn.Module, layer: AdaptedLayer) -> bool:
    """Return whether a layer's LoRA changes any of its weights, in their precision."""
    change = layer.change()
    weight: Any = module.weight
    if not weight.is_floating_point() or weight.numel() != change.numel():  # quantised
        return bool(change.any())
    change = change.to(weight.device, weight.dtype)
    base = weight.data.reshape(change.shape)
    return bool((base + change != base).any())


def _why_nothing(layers: Sequence[AdaptedLayer]) -> str:
    if not any(layer.up.any() for layer in layers):
        return (
            "all of its B are zero, as before training; if the average of a short run has not "
            "moved (ema.every), use dgpo export --weights policy"
        )
    if not any(layer.down.any() for layer in layers):
        return "all of its A are zero"
    if not any(layer.alpha for layer in layers):
        return "its scale is zero"
    return "its changes are lost in the rounding of the weights"


def _inject(denoiser: Any, layers: Mapping[str, AdaptedLayer]) -> None:
    first = next(iter(layers.values()))
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        state[f"{name}.lora_A.weight"] = layer.down
        state[f"{name}.lora_B.weight"] = layer.up
    config = peft.LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=list(layers),
        rank_pattern={f"^{name}": layer.rank for name, layer in layers.items()},
        alpha_pattern={f"^{name}": layer.alpha for name, layer in layers.items()},
        use_rslora=first.rslora,
    )
    weight = next(iter(denoiser.parameters()))
    state = {key: value.to(weight.device, denoiser.dtype) for key, value in state.items()}
    # by the names of the state: an ending like `proj_out` would name layers of blocks, too
    peft.inject_adapter_in_model(
        config, denoiser, ADAPTER, low_cpu_mem_usage=True, state_dict=state
    )
    set_peft_model_state_dict(denoiser, state, ADAPTER, low_cpu_mem_usage=True)
    if hasattr(denoiser, "_hf_peft_config_loaded"):
        denoiser._hf_peft_config_loaded = True  # as after diffusers' own add_adapter
    denoiser.train(denoiser.training)
