"""LoRA layers of a denoiser, attached by peft.

LoRA: ``y = W x + (alpha / rank) B A x`` with ``A`` [rank, in] and ``B`` [out, rank] (arXiv
2106.09685).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dgpo.distributed.sharding import is_sharded
from dgpo.errors import UserError

ADAPTER = "default"
JOINT_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""The eight joint-attention projections of Stable Diffusion 3 that the published runs train."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of an attention layer, as nearly all denoisers of diffusers call them."""
_TRAINABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LoraSettings(Protocol):
    """``LoraSettings`` are what a recipe says about the LoRA."""

    rank: int
    """The rank of every ``A`` and ``B``."""
    alpha: float
    """The LoRA is scaled by ``alpha / rank``."""
    targets: Literal["auto"] | list[str]
    """How the names of the adapted layers end."""
    init: Literal["gaussian", "default"]
    """How ``A`` begins; ``B`` begins at zero."""


def refuse_adapted(denoisers: Mapping[str, nn.Module]) -> None:
    """Refuse denoisers that carry a LoRA already.

    It would be trained, or hide the layers that ``lora.targets`` names.

    Raises:
        UserError: one does.
    """
    for name, denoiser in denoisers.items():
        if any(isinstance(module, BaseTunerLayer) for module in denoiser.modules()):
            raise UserError(
                f"model: the {name} of this pipeline carries a LoRA already, of an earlier "
                "training or of load_lora_weights; load the pipeline anew, or merge the LoRA with "
                "pipe.fuse_lora() and then take it off with pipe.unload_lora_weights()"
            )


def attach(
    denoisers: Mapping[str, nn.Module], settings: LoraSettings, targets: Sequence[str], seed: int
) -> list[LoraLayer]:
    """Add a LoRA to every denoiser; its weights are float32, and nothing else is trainable.

    Args:
        denoisers: the networks, by name.
        settings: rank, alpha and initialisation.
        targets: from :func:`resolve_targets`.
        seed: seeds the initialisation. The global random state is left alone.
    """
    for denoiser in denoisers.values():
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]
            target_modules=list(targets),
            init_lora_weights="gaussian" if settings.init == "gaussian" else True,
        )
        # peft draws from the global generator, in the order of the layers
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if hasattr(denoiser, "add_adapter"):
                denoiser.add_adapter(config, adapter_name=ADAPTER)  # pyright: ignore[reportCallIssue]
            else:
                peft.inject_adapter_in_model(config, denoiser, ADAPTER)
    layers = list(layers_in(denoisers))
    for layer in layers:
        for weights in (layer.lora_A, layer.lora_B):
            # a step of 3e-4 on a bfloat16 weight would mostly round to nothing
            weights[ADAPTER].float().requires_grad_(True)
    return layers


def resolve_targets(
    denoisers: Mapping[str, nn.Module], targets: Literal["auto"] | Sequence[str]
) -> list[str]:
    """Return the layers that ``lora.targets`` means in these denoisers, as endings of their names.

    Raises:
        UserError: a target names no layer of the denoisers, or ``auto`` finds none.
    """
    if targets == "auto":
        return fitting_targets(denoisers)
    names = _layer_names(denoisers)
    for target in targets:
        if not _is_one_of(target, names):
            raise UserError(
                f"lora.targets: no layer of {' or '.join(denoisers)} is called {target!r}; "
                f"nearest: {', '.join(_nearest(target, names)) or 'none'}"
            )
    return list(targets)


def fitting_targets(denoisers: Mapping[str, nn.Module]) -> list[str]:
    """Return the layers that ``lora.targets: auto`` adapts.

    All of :data:`JOINT_ATTENTION` if the denoisers have them all; else those of :data:`ATTENTION`
    that they have.

    >>> from dgpo.models import PipelineModel, load_pipeline
    >>> fitting_targets(PipelineModel(load_pipeline("pocket-sd")).denoisers)
    ['to_q', 'to_k', 'to_v', 'to_out.0']

    Raises:
        UserError: they have none of them.
    """
    names = _layer_names(denoisers)
    if all(_is_one_of(target, names) for target in JOINT_ATTENTION):
        return list(JOINT_ATTENTION)
    found = [target for target in ATTENTION if _is_one_of(target, names)]
    if not found:
        raise UserError(
            f"lora.targets: no layer is called {', '.join(ATTENTION)}: name layers yourself; "
            f"the first are {', '.join(names[:8])}"
        )
    return found


def _layer_names(denoisers: Mapping[str, nn.Module]) -> list[str]:
    return [
        name
        for denoiser in denoisers.values()
        for name, module in denoiser.named_modules()
        if isinstance(module, _TRAINABLE)
    ]


def _is_one_of(target: str, names: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _nearest(target: str, names: Sequence[str]) -> list[str]:
    """Return endings of layer names, as long as ``target`` is, that resemble it."""
    depth = target.count(".") + 1
    endings = {
        ".".join(parts[-length:])
        for parts in (name.split(".") for name in names)
        for length in range(1, depth + 2)
        # a name that starts with a block's number would fit one block alone
        if length <= len(parts) and not parts[-length].isdigit()
    }
    return difflib.get_close_matches(target, sorted(endings), n=4, cutoff=0.4)


def adapted_layers(denoisers: Mapping[str, nn.Module]) -> int:
    """Return the number of layers that have a LoRA."""
    return sum(1 for _ in layers_in(denoisers))


def can_merge(layers: Sequence[LoraLayer]) -> bool:
    """Return whether ``W + scale B A`` can be written without a loss that matters.

    It cannot in half precision, where rounding the sum would lose small updates, nor where ``W`` is
    sharded or quantised.
    """
    bases = [base_of(layer) for layer in layers]
    return bool(bases) and all(
        b.dtype.itemsize >= 4 and not is_sharded(b) and type(b.data) is Tensor for b in bases
    )


def layers_in(denoisers: Mapping[str, nn.Module]) -> Iterator[LoraLayer]:
    """Yield the layers that have a LoRA."""
    for denoiser in denoisers.values():
        yield from (module for module in denoiser.modules() if isinstance(module, LoraLayer))


def base_of(layer: LoraLayer) -> nn.Parameter:
    """Return ``W`` of a layer."""
    weight = layer.get_base_layer().weight
    assert isinstance(weight, nn.Parameter)
    return weight
