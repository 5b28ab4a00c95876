"""What of a LoRA fits a pipeline: its tensors by the layers of the denoisers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from dgpo.errors import UserError
from dgpo.models.weights.lora_files import LoraFile, alpha_of
from dgpo.models.weights.lora_names import Layers, convert_sd3, other_type, renamed, sort

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways of peft to begin a LoRA that change the base weights, too."""


@dataclass
class AdaptedLayer:
    """An ``AdaptedLayer`` holds the LoRA of one layer, in float32.

    Args:
        down: ``A`` [rank, in, ...].
        up: ``B`` [out, rank, ...].
        alpha: ``B A`` is scaled by ``alpha / rank``,
        rslora: or by ``alpha / sqrt(rank)`` (arXiv 2312.03732).
    """

    down: Tensor
    up: Tensor
    alpha: float
    rslora: bool

    @property
    def rank(self) -> int:
        """Return the number of rows of ``down``."""
        return len(self.down) if self.down.dim() else 0

    def change(self) -> Tensor:
        """Return what is added to the weight, [out, in * ...]."""
        scale = self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        return (self.up.flatten(1) @ self.down.flatten(1)) * scale


def fit(
    pipe: Any, lora: LoraFile, denoisers: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, AdaptedLayer]], str]:
    """Return the layers of a LoRA by denoiser and name, and a sentence about them.

    Raises:
        UserError: none fits, something has other widths or is damaged, or it is no plain LoRA.
    """
    _refuse_other_types(lora)
    kinds = sort(lora.tensors)
    if len(kinds.adapters) > 1:
        raise UserError(f"it holds several adapters: {', '.join(sorted(kinds.adapters))}")
    if not kinds.parts:
        raise UserError(_none_fits(lora, kinds.texts))
    names = {
        name: [key for key, module in denoiser.named_modules() if _shapes(module, 1)]
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
    made: dict[str, dict[str, AdaptedLayer]] = {}
    for (name, key), parts in placed.items():
        layer = _layer(parts, tensors, key, lora.config(name))
        _refuse_misfit(layer, parts, denoisers[name].get_submodule(key), name)
        made.setdefault(name, {})[key] = layer
    return made, _said(made, placed, kinds.texts, [*lost, *kinds.others])


def _said(
    made: Mapping[str, Mapping[str, AdaptedLayer]],
    placed: Mapping[tuple[str, str], Mapping[str, str]],
    texts: list[str],
    lost: list[str],
) -> str:
    """Say how many tensors fit, how many are for text encoders, and how many fit nothing."""
    counts = dict.fromkeys(made, 0)
    for (name, _), parts in placed.items():
        counts[name] += len(parts)
    total = sum(counts.values()) + len(texts) + len(lost)
    said = []
    for name, layers in made.items():
        ranks = sorted({layer.rank for layer in layers.values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        said.append(f"{counts[name]} of {total} tensors fit the {name} ({rank})")
    if texts:
        said.append(f"{len(texts)} for text_encoder are left out")
    if lost:
        said.append(f"{len(lost)} fit nothing, such as {lost[0]!r:.100}, and are left out")
    return "; ".join(said)


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
    ways: list[Callable[[], Any]] = [lambda: convert_sd3(plain, blocks)]
    if hasattr(pipe, "lora_state_dict"):
        own = {"unet_config": pipe.unet.config} if hasattr(pipe, "unet") else {}
        # diffusers takes some names of layers with one pair of names of matrices alone
        pairs = ("lora_A", "lora_B"), ("lora_down", "lora_up")
        forms = [plain, *(renamed(plain, *pair) for pair in pairs)]
        ways += [partial(pipe.lora_state_dict, form, **own) for form in forms]
    for convert in ways:
        try:
            made = convert()
        except Exception:  # names and shapes that a converter does not know fail in any way
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


def _layer(
    parts: Mapping[str, str], tensors: Mapping[str, Tensor], name: str, config: Mapping[str, Any]
) -> AdaptedLayer:
    if not {"down", "up"} <= set(parts):
        raise UserError(f"{next(iter(parts.values()))!r:.120} stands without its other matrix")
    for part in ("down", "up"):
        value = tensors[parts[part]]
        if not value.is_floating_point() or not bool(value.float().isfinite().all()):
            raise UserError(f"{parts[part]!r:.120} holds numbers that are not finite real ones")
    down, up = (tensors[parts[part]].float() for part in ("down", "up"))
    layer = AdaptedLayer(down, up, 1.0, bool(config.get("use_rslora")))
    own = parts.get("alpha")
    layer.alpha = alpha_of(config, name, layer.rank) if own is None else _number(tensors[own], own)
    return layer


def _number(tensor: Tensor, key: str) -> float:
    if tensor.numel() != 1 or not math.isfinite(value := float(tensor.real)):
        raise UserError(f"{key!r:.120} is no finite number")
    return value


def _shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the shapes of ``down`` and ``up`` for a layer; None where no LoRA can be."""
    if isinstance(module, nn.Linear):
        return (rank, module.in_features), (module.out_features, rank)
    if isinstance(module, _CONVOLUTIONS):
        kernel = module.kernel_size
        inside = (rank, module.in_channels // module.groups, *kernel)
        return inside, (module.out_channels, rank, *(1 for _ in kernel))
    return None


def _refuse_misfit(
    layer: AdaptedLayer, parts: Mapping[str, str], module: nn.Module, denoiser: str
) -> None:
    if not layer.rank:
        raise UserError(f"{parts['down']!r:.120} has the shape {list(layer.down.shape)}: no rank")
    shapes = _shapes(module, layer.rank)
    assert shapes is not None, "only layers that can have a LoRA were looked at"
    for part, value, shape in zip(("down", "up"), (layer.down, layer.up), shapes, strict=True):
        if tuple(value.shape) != shape:
            raise UserError(
                f"{parts[part]!r:.120} has the shape {list(value.shape)}, and the {denoiser} needs "
                f"{list(shape)} there; it is of another model"
            )
