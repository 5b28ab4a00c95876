"""Make a pipeline without weights: each network is made from its config, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from dgpo.errors import UserError
from dgpo.models.load import Precision, dtype_of, load_pipeline, of_the_hub, place_of
from dgpo.planning.meta_memory import Unfilled
from dgpo.pocket import WEIGHTS
from dgpo.registry import MODELS, nearest

_POCKET = {"pocket": WEIGHTS / "scenes", "pocket-signs": WEIGHTS / "signs"}


def skeleton(
    name: str,
    precision: Precision,
    vae_precision: Precision | None = None,
    device: torch.device | str = "meta",
) -> Any:
    """Make the pipeline of a recipe's ``model`` on the meta device, or with random weights.

    Only configs and tokenizers are read from a folder or the hub. A pipeline that a function makes
    is made whole, and its weights are dropped.

    Args:
        name: a name as :func:`dgpo.models.load.load_pipeline` takes it.
        precision: the precision of the weights.
        vae_precision: the precision of the autoencoder's weights; None for ``precision``.
        device: where the networks are made; anywhere but on the meta device their weights are
            random.

    Raises:
        UserError: there is no such pipeline, or a part of it cannot be made from its config.
    """
    if name not in _POCKET and (name in MODELS or ":" in name):
        return load_pipeline(name, precision, vae_precision=vae_precision).to(device)
    place = _POCKET.get(name) or place_of(name)
    try:
        index: Any = DiffusionPipeline.load_config(place)
    except (OSError, ValueError) as error:
        why = f"model: {name!r} has no model_index.json that can be read: {first_line(error)}"
        raise UserError(
            why if isinstance(place, Path) else of_the_hub(name, first_line(error))
        ) from error
    wanted = str(index.get("_class_name"))
    kind = getattr(diffusers, wanted, None)
    if kind is None:
        pipelines = [n for n in dir(diffusers) if n.endswith("Pipeline")]
        raise UserError(
            f"model: {name!r} is a {wanted}, which this diffusers ({diffusers.__version__}) does "
            f"not have{nearest(wanted, pipelines)}"
        )
    parts = {}
    for part, value in index.items():
        if isinstance(value, (list, tuple)) and len(value) == 2:
            parts[part] = None if value[0] is None else _part(place, part, value, device)
        elif not part.startswith("_"):
            parts[part] = value
    pipe = kind(**parts)
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            own = vae_precision if part == "vae" and vae_precision is not None else precision
            _cast(module.requires_grad_(False).eval(), dtype_of(own))
    return pipe


def _part(place: str | Path, name: str, what: Sequence[str], device: torch.device | str) -> Any:
    """Make a component: a network on a device, or a scheduler or tokenizer as it is."""
    library, kind = what
    found: type = _class(library, kind)
    made_by: Any = found
    try:
        if issubclass(found, diffusers.ModelMixin):
            read = made_by.load_config(place, subfolder=name)
            return _made_on(device, lambda: made_by.from_config(read))
        if issubclass(found, transformers.PreTrainedModel):
            config = made_by.config_class.from_pretrained(place, subfolder=name)
            return _made_on(device, lambda: made_by(config))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"model: {name} of {str(place)!r} ({kind}) cannot be made from its config.json: "
            f"{first_line(error)}"
        ) from error
    try:
        return made_by.from_pretrained(place, subfolder=name)
    except (OSError, ValueError, ImportError, TypeError):
        if "Scheduler" in kind:
            raise
        return None  # the tokenizer's files are missing: only prompts cannot be encoded


def _class(library: str, kind: str) -> Any:
    holders = [
        getattr(diffusers.pipelines, library, None),
        {"diffusers": diffusers, "transformers": transformers}.get(library),
    ]
    for holder in holders:
        if hasattr(holder, kind):
            return getattr(holder, kind)
    raise UserError(f"model: a part is a {library}.{kind}, which is not installed")


def _made_on(device: torch.device | str, make: Callable[[], Any]) -> Any:
    filled = nullcontext() if torch.device(device).type != "meta" else Unfilled()
    try:
        with torch.device(device), filled:
            return make()
    except (NotImplementedError, RuntimeError):
        if torch.device(device).type != "meta":
            raise
        # building it computes something, which needs numbers
        with init_empty_weights(include_buffers=False):
            return make().to("meta")


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights and the buffers that are saved as loading does: some stay in float32."""
    kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if isinstance(module, diffusers.ModelMixin) or dtype == torch.float16:
        kept.update(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, value in module.state_dict(keep_vars=True).items():
        if value.is_floating_point() and not kept.intersection(name.split(".")):
            value.data = value.data.to(dtype)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0][:200]


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of parameters and buffers, each counted once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def parameters_in(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
