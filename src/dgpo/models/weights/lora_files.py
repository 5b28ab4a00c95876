"""Files of a LoRA: those of a run, and those that other trainers write and other programs read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dgpo.disk import CHECKPOINT_TENSORS, DAMAGED
from dgpo.errors import UserError
from dgpo.models.weights.lora import ADAPTER
from dgpo.models.weights.lora_names import DENOISERS, sort

_SECOND = "transformer_2"
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PEFT_FILE = "adapter_model.safetensors"
_PEFT_CONFIG = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_FILES = (_DIFFUSERS_FILE, _PEFT_FILE, "pytorch_lora_weights.bin", "adapter_model.bin")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_METADATA = "lora_adapter_metadata"
_ONE_FILE = "lora.safetensors"


@dataclass(frozen=True)
class LoraFile:
    """A ``LoraFile`` holds what stands in the files of a LoRA.

    Args:
        place: where they lie.
        tensors: the tensors by their names; those of a second expert begin with
            ``transformer_2.``.
        configs: peft's settings by the name of the denoiser; by ``""`` where no name is said.
    """

    place: Path
    tensors: dict[str, Tensor]
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def config(self, denoiser: str) -> dict[str, Any]:
        """Return peft's settings for a denoiser; empty where the file has none."""
        return self.configs.get(denoiser, self.configs.get("", {}))


def save(pipe: Any, denoisers: Mapping[str, nn.Module], folder: Path) -> None:
    """Write the LoRA of every denoiser; see :meth:`dgpo.models.policy.Policy.save`."""
    lora = LoraFile(folder, {})
    for name, denoiser in denoisers.items():
        weights = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
        lora.tensors.update({f"{name}.{key}": value.detach() for key, value in weights.items()})
        # peft holds names in sets, which every process orders differently
        lora.configs[name] = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in vars(denoiser)["peft_config"][ADAPTER].to_dict().items()
        }
    # pipelines without a LoRA loader (PixArt): the two files that peft's own tools read
    write(lora, folder, "diffusers" if hasattr(pipe, "save_lora_weights") else "peft")


def read(given: Path, weights: str = "slow") -> LoraFile:
    """Read a LoRA.

    Args:
        given: a file, a folder with one, a run, or a checkpoint of a run.
        weights: ``slow``, ``policy`` or ``old``: which weights of a checkpoint.

    Raises:
        UserError: there is no LoRA, or its files are damaged.
    """
    if given.name == CHECKPOINT_TENSORS:
        given = given.parent
    if (given / CHECKPOINT_TENSORS).is_file():
        return _of_checkpoint(given, weights)
    if given.is_dir() and not _lora_files(given):
        if (given / "lora").is_dir():
            return read(given / "lora")
        raise UserError(f"LoRA {given}: the folder {_instead(given)}")
    if not given.exists():
        raise UserError(f"LoRA {given}: there is no such file or folder")
    file = _lora_files(given)[0] if given.is_dir() else given
    made = _of_file(file)
    second = file.parent / _SECOND
    if not _lora_files(second):
        return made
    more = _of_file(_lora_files(second)[0])
    tensors = {f"{_SECOND}.{k.removeprefix('transformer.')}": v for k, v in more.tensors.items()}
    configs = {_SECOND: more.config("transformer")}
    return replace(made, tensors={**made.tensors, **tensors}, configs={**made.configs, **configs})


def _lora_files(folder: Path) -> list[Path]:
    """Return the file of a LoRA in a folder: that of a name that trainers use, or the only one.

    Raises:
        UserError: there are several, and none has such a name.
    """
    if known := [folder / name for name in _FILES if (folder / name).is_file()]:
        return known
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise UserError(f"LoRA {folder}: it holds {len(found)} files ({names}, ...); name one")
    return found


def _instead(folder: Path) -> str:
    """Return what a folder without a LoRA holds, and what to do with it."""
    if (folder / "model").is_dir() and (folder / "recipe.yaml").is_file():
        return "is a run that trained all weights: dgpo export --merge makes a pipeline of it"
    if (folder / "model_index.json").is_file():
        return "holds a whole pipeline: give it as the model"
    return "holds no LoRA (*.safetensors); give a run, a checkpoint or the file of a LoRA"


def read_weights(folder: Path, weights: str) -> dict[str, Tensor]:
    """Read the trained weights of a checkpoint by the names of denoiser and parameter.

    Args:
        folder: the checkpoint.
        weights: ``slow``, ``policy`` or ``old``.

    Raises:
        UserError: its file is damaged.
    """
    with _told(folder / CHECKPOINT_TENSORS), safe_open(folder / CHECKPOINT_TENSORS, "pt") as opened:
        keys = [k for k in opened.keys() if k.startswith(f"{weights}.")]  # noqa: SIM118
        return {key.removeprefix(f"{weights}."): opened.get_tensor(key) for key in keys}


def _of_checkpoint(folder: Path, weights: str) -> LoraFile:
    tensors = read_weights(folder, weights)
    if not sort(tensors).parts:
        raise UserError(
            f"LoRA {folder}: this checkpoint holds no LoRA, since its run trained all weights"
        )
    run = folder.parent.parent
    if not (run / "lora").is_dir():
        raise UserError(
            f"LoRA {folder}: the alpha of a checkpoint's LoRA stands in the lora/ of its run, and "
            f"{run} has none; give the checkpoint in the folder of its run"
        )
    return LoraFile(folder, tensors, read(run / "lora").configs)


def _of_file(file: Path) -> LoraFile:
    configs: dict[str, dict[str, Any]] = {}
    if file.suffix in _PICKLED:
        tensors = _unpickled(file)
    else:
        with _told(file), safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            said = (opened.metadata() or {}).get(_METADATA)
            for key, value in (json.loads(said) if said else {}).items():
                denoiser, _, name = key.partition(".")
                configs.setdefault(denoiser, {})[name] = value
    beside = file.with_name(_PEFT_CONFIG)
    if file.name.startswith("adapter_model.") and beside.is_file():
        with _told(beside):
            configs[""] = dict(json.loads(beside.read_text(encoding="utf-8")))
    return LoraFile(file, tensors, configs)


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in as many ways as pickle has
        raise UserError(
            f"LoRA {file}: it cannot be read as tensors alone, and code in it is not run "
            f"({type(error).__name__}); save it as .safetensors"
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided
        for key, value in found.items()
    ):
        raise UserError(f"LoRA {file}: it holds no dict of tensors by their names")
    return found


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """Tell in one line that a file is damaged, if reading it fails in the block."""
    try:
        yield
    except (*DAMAGED, SafetensorError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"LoRA {file}: the file is damaged or of another kind ({why})") from error


def alpha_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return the alpha of a layer by peft's settings; the rank where there are none.

    Raises:
        UserError: it is no finite number, or the settings' patterns are none.
    """
    try:
        patterns = config.get("alpha_pattern") or {}
        alpha = config.get("lora_alpha", 8 if config else rank)  # 8 is peft's own default
        made = float(patterns.get(get_pattern_key(list(patterns), layer), alpha))
    except (*DAMAGED, re.error) as error:
        raise UserError(f"its settings have no alpha for {layer!r:.100} ({error})") from error
    if not math.isfinite(made):
        raise UserError(f"its settings have the alpha {made} for {layer!r:.100}")
    return made


def write(lora: LoraFile, output: Path, form: str) -> list[Path]:
    """Write a LoRA of a run as other programs read it.

    Args:
        lora: from :func:`read`, of a run or one of its checkpoints.
        output: a folder; or a file, for a format that is one.
        form: ``diffusers``: what ``load_lora_weights`` reads; ``peft``: what
            ``PeftModel.from_pretrained`` reads; ``kohya``: ``lora_down`` and ``lora_up`` with an
            alpha for each layer; ``comfyui``: the names that ComfyUI has for the same layers.

    Returns:
        The files with weights, those of a second expert in ``transformer_2``.
    """
    by_denoiser: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, (written, part) in sort(lora.tensors).parts.items():
        written = written.removeprefix(_PEFT_PREFIX)
        first, _, rest = written.partition(".")
        denoiser, layer = (first, rest) if first in DENOISERS else (DENOISERS[0], written)
        by_denoiser.setdefault(denoiser, {}).setdefault(layer, {})[part] = lora.tensors[key]
    made = []
    for denoiser, layers in by_denoiser.items():
        config = lora.config(denoiser)
        folder = output if denoiser != _SECOND else output / _SECOND
        file = folder / {"diffusers": _DIFFUSERS_FILE, "peft": _PEFT_FILE}.get(form, _ONE_FILE)
        if output.suffix == ".safetensors":
            file = output if denoiser != _SECOND else output.with_stem(f"{output.stem}-{_SECOND}")
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = dict(_renamed(denoiser, layers, config, form))
        metadata = {"format": "pt"}
        if form == "diffusers":
            stem = "unet" if denoiser == "unet" else "transformer"
            settings = {f"{stem}.{key}": value for key, value in config.items()}
            metadata[_METADATA] = json.dumps(settings, indent=2, sort_keys=True)
        if form == "peft":
            text = json.dumps(config, indent=2, default=str)
            file.with_name(_PEFT_CONFIG).write_text(text + "\n", encoding="utf-8")
        save_file(tensors, file, metadata)
        made.append(file)
    return made


def _renamed(
    denoiser: str, layers: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], form: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a denoiser's LoRA by the names of a format."""
    unet = denoiser == "unet"
    for layer, parts in layers.items():
        prefix, down, up = "unet." if unet else "transformer.", "lora_A", "lora_B"
        name = layer
        if form == "peft":
            prefix = _PEFT_PREFIX
        elif form == "kohya" or (form == "comfyui" and unet):
            # OneTrainer's prefix for transformers, which diffusers reads of FLUX and ComfyUI of
            # SD3 and FLUX by diffusers' layers; kohya's own stands for other layers there
            prefix = "lora_unet_" if unet else "lora_transformer_"
            name, down, up = layer.replace(".", "_"), "lora_down", "lora_up"
        yield f"{prefix}{name}.{down}.weight", parts["down"].contiguous()
        yield f"{prefix}{name}.{up}.weight", parts["up"].contiguous()
        if form in ("kohya", "comfyui"):
            alpha = alpha_of(config, layer, len(parts["down"]))
            yield f"{prefix}{name}.alpha", torch.tensor(alpha)
