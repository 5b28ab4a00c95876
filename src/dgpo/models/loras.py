"""The one loader of LoRAs: it reads what any trainer has written, and says what of it fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn

from dgpo.errors import UserError
from dgpo.models.weights.lora import ADAPTER, refuse_adapted
from dgpo.models.weights.lora_files import LoraFile, alpha_of, read
from dgpo.models.weights.lora_names import DENOISERS, Layers, convert_sd3, other_type, renamed, sort

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways of peft to begin a LoRA that change the base weights, too."""


@dataclass
class _Layer:
    """The matrices of one layer: ``down`` [rank, in, ...], ``up`` [out, rank, ...]."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def change(self, root: bool) -> Tensor:
        """Return what is added to the weight, [out, in ...] in float32; ``root`` for
        rank-stabilised LoRAs (arXiv 2312.03732)."""
        scale = self.alpha / (math.sqrt(self.rank) if root else self.rank)
        return (self.up.flatten(1) @ self.down.flatten(1)) * scale


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


def put_lora(pipe: Any, lora: LoraFile, *, weight: float = 1.0, fresh: bool = False) -> str:
    """Put a LoRA that was read into a pipeline, as :func:`load_lora` does.

    Args:
        pipe: a diffusers pipeline without a LoRA.
        lora: what stands in the files.
        weight: the LoRA's strength.
        fresh: whether a LoRA that changes nothing is taken, as it is when training starts.

    Raises:
        UserError: as :func:`load_lora`.
    """
    denoisers, fitting, said = _prepared(pipe, lora, weight, fresh)
    for name, layers in fitting.items():
        _inject(denoisers[name], layers, _root(lora, name))
    return said


@torch.no_grad()
def merge_lora(pipe: Any, lora: LoraFile) -> str:
    """Add a LoRA to the weights of a pipeline for good.

    The sum is made in float32 and rounded once.

    Raises:
        UserError: as :func:`load_lora`.
    """
    denoisers, fitting, said = _prepared(pipe, lora, 1.0, fresh=True)
    for name, layers in fitting.items():
        for key, layer in layers.items():
            weight: Any = denoisers[name].get_submodule(key).weight
            change = layer.change(_root(lora, name)).reshape(weight.shape).to(weight.device)
            weight.copy_(weight.float() + change)
    return said


def _prepared(
    pipe: Any, lora: LoraFile, weight: float, fresh: bool
) -> tuple[dict[str, nn.Module], dict[str, dict[str, _Layer]], str]:
    """Return the denoisers, the layers that fit them, and a sentence; change nothing."""
    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    denoisers = {name: m for name, m in found.items() if isinstance(m, nn.Module)}
    if not denoisers:
        raise UserError(f"LoRA {lora.place}: {type(pipe).__name__} has no denoiser for it")
    refuse_adapted(denoisers)
    try:
        fitting, said = _fit(pipe, lora, denoisers)
        for name, layers in fitting.items():
            for layer in layers.values():
                layer.alpha *= weight
            if not fresh and not any(
                _changes(denoisers[name].get_submodule(key), layer, _root(lora, name))
                for key, layer in layers.items()
            ):
                raise UserError(
                    f"it changes nothing in the {name}: {_why_nothing(layers.values())}"
                )
    except UserError as error:
        raise UserError(f"LoRA {lora.place}: {error}") from error
    return denoisers, fitting, f"LoRA {lora.place}: {said}"


def _fit(
    pipe: Any, lora: LoraFile, denoisers: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, _Layer]], str]:
    """Return the layers of a LoRA by denoiser and name, and a sentence about them."""
    _refuse_other_types(lora)
    kinds = sort(lora.tensors)
    if len(kinds.adapters) > 1:
        raise UserError(f"it holds several adapters: {', '.join(sorted(kinds.adapters))}")
    if not kinds.parts:
        raise UserError(_none_fits(lora, kinds.texts))
    names = {
        name: [key for key, module in denoiser.named_modules() if _widths(module)]
        for name, denoiser in denoisers.items()
    }
    tensors = {key: lora.tensors[key] for key in kinds.parts}
    placed, lost = _placed(tensors, Layers(names))
    if lost:
        for converted in _converted(pipe, tensors):
            other, more = _placed(converted, Layers(names))
            if len(other) > len(placed):
                tensors, placed, lost = converted, other, more
    if not placed:
        raise UserError(_none_fits(lora, kinds.texts))
    made: dict[str, dict[str, _Layer]] = {}
    for (name, key), parts in placed.items():
        layer = _layer(parts, tensors, partial(alpha_of, lora.config(name), key))
        _refuse_misfit(layer, parts, denoisers[name].get_submodule(key), name)
        made.setdefault(name, {})[key] = layer
    return made, _said(made, placed, {"text_encoder": kinds.texts, "": [*lost, *kinds.others]})


def _placed(
    tensors: Mapping[str, Tensor], layers: Layers
) -> tuple[dict[tuple[str, str], dict[str, str]], list[str]]:
    """Return the names of the parts of each layer, and the names of those without a layer."""
    placed: dict[tuple[str, str], dict[str, str]] = {}
    lost = []
    for key, (written, part) in sort(tensors).parts.items():
        if (place := layers.find(written)) is None:
            lost.append(key)
            continue
        parts = placed.setdefault(place, {})
        if part in parts:
            raise UserError(f"{parts[part]!r:.100} and {key!r:.100} are both of {place[1]}")
        parts[part] = key
    return placed, lost


def _converted(pipe: Any, tensors: Mapping[str, Tensor]) -> Iterable[dict[str, Tensor]]:
    """Yield the tensors by the names of diffusers, as far as somebody knows how to convert them."""
    plain: dict[str, Tensor] = {}
    by_layer: dict[str, dict[str, Tensor]] = {}
    parts = sort(tensors).parts
    for key, (written, part) in parts.items():
        by_layer.setdefault(written, {})[part] = tensors[key]
    for key, (written, part) in parts.items():
        if part == "alpha":
            continue
        own, value = by_layer[written], tensors[key]
        if part == "up" and "alpha" in own and "down" in own and len(own["down"]):
            # the scale goes into the matrix: converters split, rename and lose the alphas
            value = value * (_number(own["alpha"], key) / len(own["down"]))
        plain[key] = value
    blocks = getattr(getattr(getattr(pipe, "transformer", None), "config", None), "num_layers", 0)
    yield convert_sd3(plain, blocks)
    if (convert := getattr(pipe, "lora_state_dict", None)) is None:
        return
    given = {"unet_config": pipe.unet.config} if hasattr(pipe, "unet") else {}
    # diffusers takes some names of layers with one pair of names of matrices alone
    for names in ((), ("lora_A", "lora_B"), ("lora_down", "lora_up")):
        try:
            made = convert(dict(renamed(plain, *names) if names else plain), **given)
        except Exception:  # names that diffusers does not know fail in any way
            continue
        yield made[0] if isinstance(made, tuple) else made


def _refuse_other_types(lora: LoraFile) -> None:
    kind = other_type(lora.tensors)
    for config in lora.configs.values():
        named = str(config.get("peft_type") or "LORA").rpartition(".")[2]
        begun = str(config.get("init_lora_weights", "")).lower()
        if named.upper() != "LORA":
            kind = named[:40]
        elif config.get("use_dora"):
            kind = "DoRA"
        elif begun.startswith(_MOVES_BASE):
            kind = f"a LoRA on base weights that were changed (init_lora_weights = {begun:.20})"
    if kind is not None:
        raise UserError(f"it is {kind}, and only plain LoRAs are read; merge it into its model")


def _none_fits(lora: LoraFile, texts: list[str]) -> str:
    count = len(lora.tensors)
    if texts and len(texts) == count:
        return f"all of its {count} tensors are for text encoders, and only denoisers are adapted"
    rest = [key for key in lora.tensors if key not in set(texts)]
    such = f", such as {rest[0]!r:.120}" if rest else ""
    return f"none of its {count} tensors fits the pipeline{such}; it is of another model"


def _layer(parts: Mapping[str, str], tensors: Mapping[str, Tensor], alpha: Any) -> _Layer:
    if not {"down", "up"} <= set(parts):
        raise UserError(f"{next(iter(parts.values()))!r:.120} stands without its other matrix")
    for part in ("down", "up"):
        value = tensors[parts[part]]
        if not value.is_floating_point() or not bool(value.float().isfinite().all()):
            raise UserError(f"{parts[part]!r:.120} holds numbers that are not finite real ones")
    down, up = (tensors[parts[part]].float() for part in ("down", "up"))
    rank = len(down) if down.dim() else 0
    own = _number(tensors[parts["alpha"]], parts["alpha"]) if "alpha" in parts else alpha(rank)
    return _Layer(down, up, own)


def _number(tensor: Tensor, key: str) -> float:
    if tensor.numel() != 1 or not math.isfinite(value := float(tensor.real)):
        raise UserError(f"{key!r:.120} is no finite number")
    return value


def _widths(module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the shapes of ``down`` without the rank and of ``up`` of rank 1; None where no LoRA
    can be."""
    if isinstance(module, nn.Linear):
        return (module.in_features,), (module.out_features, 1)
    if isinstance(module, _CONVOLUTIONS):
        kernel = module.kernel_size
        return (module.in_channels // module.groups, *kernel), (
            module.out_channels,
            1,
            *(1 for _ in kernel),
        )
    return None


def _refuse_misfit(
    layer: _Layer, parts: Mapping[str, str], module: nn.Module, denoiser: str
) -> None:
    widths = _widths(module)
    assert widths is not None, "layers have widths"
    inside, outside = widths
    wanted_up = (outside[0], layer.rank if layer.down.dim() else 0, *outside[2:])
    if not layer.down.dim() or not layer.rank:
        raise UserError(f"{parts['down']!r:.120} has the shape {list(layer.down.shape)}: no rank")
    for part, value, wanted in (
        ("down", layer.down, (layer.rank, *inside)),
        ("up", layer.up, wanted_up),
    ):
        if tuple(value.shape) != wanted:
            raise UserError(
                f"{parts[part]!r:.120} has the shape {list(value.shape)}, and the {denoiser} needs "
                f"{list(wanted)} there; it is of another model"
            )


def _root(lora: LoraFile, denoiser: str) -> bool:
    return bool(lora.config(denoiser).get("use_rslora"))


def _changes(module: nn.Module, layer: _Layer, root: bool) -> bool:
    """Return whether a layer's LoRA changes any of its weights, in their precision."""
    change = layer.change(root)
    weight: Any = module.weight
    if type(weight.data) is not Tensor or weight.numel() != change.numel():  # quantised
        return bool(change.any())
    change = change.to(weight.device, weight.dtype)
    base = weight.data.reshape(change.shape)
    return bool((base + change != base).any())


def _why_nothing(layers: Iterable[_Layer]) -> str:
    layers = list(layers)
    if not any(layer.up.any() for layer in layers):
        return "all of its B are zero, as before training"
    if not any(layer.down.any() for layer in layers):
        return "all of its A are zero"
    if not any(layer.alpha for layer in layers):
        return "its scale is zero"
    return "its changes are lost in the rounding of the weights"


def _inject(denoiser: Any, layers: Mapping[str, _Layer], root: bool) -> None:
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
        use_rslora=root,
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


def _said(
    made: Mapping[str, Mapping[str, _Layer]],
    placed: Mapping[tuple[str, str], Mapping[str, str]],
    left: Mapping[str, list[str]],
) -> str:
    counts = dict.fromkeys(made, 0)
    for (name, _), parts in placed.items():
        counts[name] += len(parts)
    total = sum(counts.values()) + sum(map(len, left.values()))
    said = []
    for name, layers in made.items():
        ranks = sorted({layer.rank for layer in layers.values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        said.append(f"{counts[name]} of {total} tensors fit the {name} ({rank})")
    if left["text_encoder"]:
        said.append(f"{len(left['text_encoder'])} for text_encoder are left out")
    if left[""]:
        said.append(f"{len(left[''])} fit nothing, such as {left[''][0]!r:.100}, and are left out")
    return "; ".join(said)
