"""From the ``model`` of a recipe to a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from dgpo.errors import UserError
from dgpo.models.quantization import Quantization, quantized
from dgpo.models.weights.lora import load as load_lora
from dgpo.models.weights.lora import lora_folder
from dgpo.registry import MODELS, resolve

Precision = Literal["float32", "bfloat16", "float16"]
_VAE_PRECISION = "memory.vae_precision (--vae-precision)"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(
    name: str,
    precision: Precision = "float32",
    quantization: Quantization | None = None,
    vae_precision: Precision | None = None,
) -> Any:
    """The pipeline that a recipe calls ``model``.

    Args:
        name: a registered name (``pocket``), ``package.module:function``, a folder written by
            ``save_pretrained``, or the id of a model on the Hugging Face hub.
        precision: of all weights.
        quantization: of the denoiser's weights, for a folder or a hub id; None: none.
        vae_precision: of the weights of the autoencoder; None: ``precision``.

    Raises:
        UserError: the folder holds no whole pipeline, the hub has none of this name, or a
            precision is asked of an autoencoder that is not there.
    """
    dtype = dtype_of(precision)
    vae_dtype = None if vae_precision is None else dtype_of(vae_precision, _VAE_PRECISION)
    pipe = _loaded(name, dtype, quantization, vae_dtype)
    if vae_dtype is not None:
        check_vae(pipe, vae_dtype)
    return pipe


def check_vae(pipe: Any, dtype: torch.dtype) -> None:
    """See that the autoencoder has the precision that ``memory.vae_precision`` asks for.

    Raises:
        UserError: it has another one, or the pipeline has none.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None or vae.dtype != dtype:
        found = f"no vae; leave {_VAE_PRECISION} out"
        if vae is not None:
            found = f"one in {vae.dtype}; use pipe.vae.to({dtype})"
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"memory.vae_precision = {name!r}: {type(pipe).__name__} has {found}")


def _loaded(
    name: str,
    dtype: torch.dtype,
    quantization: Quantization | None,
    vae_dtype: torch.dtype | None,
) -> Any:
    if name in MODELS or ":" in name:
        if quantization is not None:
            raise UserError(
                f"memory.quantization = {quantization!r}: {name!r} is made by a function; only a "
                "folder or a hub id can be quantised while it is loaded. Use null"
            )
        pipe = _made_by(name)
        if vae_dtype is None:
            return pipe if dtype == torch.float32 else pipe.to(dtype)
        for part, module in pipe.components.items():
            if isinstance(module, nn.Module):
                module.to(vae_dtype if part == "vae" else dtype)
        return pipe
    place = place_of(name)
    if isinstance(place, Path):
        return _read_folder(place, dtype, quantization, vae_dtype)
    try:
        return _read(place, dtype, quantization, vae_dtype)
    except OSError as error:
        raise UserError(
            f"model: cannot load {name!r} from the Hugging Face hub ({_first_line(error)}). Is "
            "the name right, the licence accepted and `hf auth login` done? No folder of that name "
            "exists either"
        ) from error


def dtype_of(precision: Precision, setting: str = "precision") -> torch.dtype:
    """The type of weights.

    Args:
        precision: its name.
        setting: what the user calls it.

    Raises:
        UserError: there is no such precision.
    """
    if precision not in _DTYPES:
        raise UserError(f"{setting}: {precision!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[precision]


def place_of(name: str) -> Path | str:
    """The folder of a pipeline, or its id on the Hugging Face hub.

    Raises:
        UserError: the folder holds no pipeline, or ``name`` is neither.
    """
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            _refuse_other_folder(folder)
            return folder
    except (OSError, RuntimeError, ValueError) as error:  # a name or a home that cannot be
        raise UserError(f"model: {name!r:.200} is no name of a folder: {error}"[:400]) from error
    if not _may_be_hub_id(name):
        raise UserError(
            f"model: there is no folder {name!r}, and no model of that name "
            f"({', '.join(MODELS)}); a model of the Hugging Face hub is written owner/name"
        )
    return name


def _made_by(name: str) -> Any:
    """The pipeline that a registered or the user's own function makes."""
    make: Any = resolve("model", name)
    try:
        pipe = make()
    except UserError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise UserError(f"model {name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(getattr(pipe, "components", None), Mapping):
        raise UserError(f"model {name!r} makes {pipe!r:.80}, and not a diffusers pipeline")
    return pipe


def _refuse_other_folder(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        found = sorted(path.name for path in folder.iterdir())[:5]
        raise UserError(
            f"model: the folder {str(folder)!r} holds no pipeline (no model_index.json; it has "
            f"{', '.join(found) or 'nothing'}); give the folder that pipe.save_pretrained wrote"
        )


def _read_folder(
    folder: Path,
    dtype: torch.dtype,
    quantization: Quantization | None,
    vae_dtype: torch.dtype | None,
) -> Any:
    try:
        return _read(folder, dtype, quantization, vae_dtype)
    except UserError:
        raise
    except Exception as error:  # a folder can be broken in as many ways as it has files
        raise UserError(
            f"model: the folder {str(folder)!r} cannot be read as a pipeline "
            f"({type(error).__name__}: {_first_line(error)}); give a whole folder that "
            "pipe.save_pretrained wrote"
        ) from error


def _read(
    place: str | Path,
    dtype: torch.dtype,
    quantization: Quantization | None,
    vae_dtype: torch.dtype | None,
) -> Any:
    # weights that were rounded once cannot be widened again: it is read in its own precision
    by_part = {"default": dtype, "vae": vae_dtype}
    how: dict[str, Any] = {"torch_dtype": dtype if vae_dtype is None else by_part}
    if quantization is not None:
        how["quantization_config"] = quantized(place, quantization, dtype)
    return DiffusionPipeline.from_pretrained(place, **how)


def _may_be_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~"))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def load_for_sampling(
    model: str,
    precision: str = "float32",
    *,
    lora: Path | None = None,
    device: str | None = None,
    vae_precision: str | None = None,
) -> Any:
    """Load a pipeline, with a LoRA if one is named, and put it on its device.

    Args:
        model: as of :func:`load_pipeline`.
        precision: of all weights.
        lora: a run folder, or its ``lora/``.
        device: ``cpu``, ``cuda``, ``cuda:0``; None for a GPU if there is one.
        vae_precision: of the weights of the autoencoder; None: ``precision``.

    Raises:
        UserError: it cannot be loaded, or there is no such device.
    """
    folder = None if lora is None else lora_folder(lora)
    quiet()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _try_device(device)
    pipe = load_pipeline(
        model,
        precision,  # pyright: ignore[reportArgumentType]
        vae_precision=vae_precision,  # pyright: ignore[reportArgumentType]
    )
    if folder is not None:
        load_lora(pipe, folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _try_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"--device {name}: {why}; give cpu, cuda or cuda:0") from error


def quiet() -> None:
    """Keep the libraries' own progress bars out of ours."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
