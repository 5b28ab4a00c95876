"""From the ``model`` of a recipe to a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from dgpo.errors import UserError, told
from dgpo.models.loras import put_lora
from dgpo.models.quantization import Quantization, quantized
from dgpo.models.weights.lora_files import read as read_lora
from dgpo.registry import MODELS, resolve
from dgpo.user_code import user_code

Precision = Literal["float32", "bfloat16", "float16"]
_VAE_PRECISION = "memory.vae_precision (--vae-precision)"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(
    name: str,
    precision: Precision = "float32",
    quantization: Quantization | None = None,
    vae_precision: Precision | None = None,
) -> Any:
    """Load the pipeline that a recipe calls ``model``.

    >>> pipe = load_pipeline("pocket")
    >>> type(pipe).__name__
    'StableDiffusion3Pipeline'

    Args:
        name: a registered name (``pocket``), ``package.module:function``, a folder written by
            ``save_pretrained``, or the id of a model on the Hugging Face hub.
        precision: the precision of all weights.
        quantization: how the denoiser's weights are rounded, for a folder or a hub id; None for not
            at all.
        vae_precision: the precision of the autoencoder's weights; None for ``precision``.

    Raises:
        UserError: the folder holds no whole pipeline, the hub has none of this name, or a
            precision is given for an autoencoder that is not there.
    """
    dtype = dtype_of(precision)
    vae_dtype = None if vae_precision is None else dtype_of(vae_precision, _VAE_PRECISION)
    load = _make if name in MODELS or ":" in name else _read
    pipe = load(name, dtype, quantization, vae_dtype)
    if vae_dtype is not None:
        check_vae(pipe, vae_dtype)
    return pipe


def check_vae(pipe: Any, dtype: torch.dtype) -> None:
    """Refuse an autoencoder whose precision ``memory.vae_precision`` does not name.

    Raises:
        UserError: its precision is another one, or the pipeline has no autoencoder.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None or vae.dtype != dtype:
        found = f"no vae; leave {_VAE_PRECISION} out"
        if vae is not None:
            found = f"one in {vae.dtype}; use pipe.vae.to({dtype})"
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"memory.vae_precision = {name!r}: {type(pipe).__name__} has {found}")


def _make(
    name: str,
    dtype: torch.dtype,
    quantization: Quantization | None,
    vae_dtype: torch.dtype | None,
) -> Any:
    """Return the pipeline that a registered or the user's own function makes."""
    if quantization is not None:
        raise UserError(
            f"memory.quantization = {quantization!r}: {name!r} is made by a function; only a "
            "folder or a hub id can be quantised while it is loaded. Use null"
        )
    make: Any = resolve("model", name)
    try:
        with user_code(f"model {name!r}"):
            pipe = make()
    except UserError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise UserError(f"model {name!r} raised {told(error)}") from error
    if not isinstance(getattr(pipe, "components", None), Mapping):
        raise UserError(f"model {name!r} makes {_shown(pipe)}, and not a diffusers pipeline")
    if vae_dtype is None:
        return pipe if dtype == torch.float32 else pipe.to(dtype)
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            module.to(vae_dtype if part == "vae" else dtype)
    return pipe


def _shown(made: Any) -> str:
    return type(made).__name__ if isinstance(made, nn.Module) else f"{made!r:.80}"


def _read(
    name: str,
    dtype: torch.dtype,
    quantization: Quantization | None,
    vae_dtype: torch.dtype | None,
) -> Any:
    """Return the pipeline of a folder or of the Hugging Face hub."""
    place = place_of(name)
    # the autoencoder is read in its own precision: weights rounded once cannot be widened again
    by_part = {"default": dtype, "vae": vae_dtype}
    how: dict[str, Any] = {"dtype": dtype if vae_dtype is None else by_part}
    # a folder can be broken in as many ways as it has files
    broken = Exception if isinstance(place, Path) else OSError
    try:
        if quantization is not None:
            how["quantization_config"] = quantized(place, quantization, dtype)
        if isinstance(place, Path):
            # diffusers misses what a pipeline was saved without, unless it is told so
            index: Any = DiffusionPipeline.load_config(place)
            how |= {name: None for name, kind in index.items() if kind == [None, None]}
        return DiffusionPipeline.from_pretrained(place, **how)
    except UserError:
        raise
    except broken as error:
        said = str(error).strip().partition("\n")[0][:200]
        if isinstance(place, Path):
            raise UserError(
                f"model: the folder {str(place)!r} cannot be read as a pipeline "
                f"({type(error).__name__}: {said}); give a whole folder that pipe.save_pretrained "
                "wrote"
            ) from error
        raise UserError(of_the_hub(name, said)) from error


def of_the_hub(name: str, said: str) -> str:
    """Return what to say when the hub does not give a model.

    Args:
        name: the model's id.
        said: the first line of the error.
    """
    return (
        f"model: cannot load {name!r} from the Hugging Face hub ({said}). Is the network there, "
        "the name right, the licence accepted and `hf auth login` done? No folder of that name "
        "exists either"
    )


def dtype_of(precision: Precision, setting: str = "precision") -> torch.dtype:
    """Return the dtype of a precision.

    Args:
        precision: its name.
        setting: the name that the user knows, for errors.

    Raises:
        UserError: there is no such precision.
    """
    if precision not in _DTYPES:
        raise UserError(f"{setting}: {precision!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[precision]


def place_of(name: str) -> Path | str:
    """Return the folder of a pipeline, or its id on the Hugging Face hub.

    Raises:
        UserError: the folder holds no pipeline, or ``name`` is neither.
    """
    try:
        folder = Path(name).expanduser()
        files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError) as error:  # no path can have this name
        raise UserError(f"model: {name!r:.200} is no name of a folder: {error}"[:400]) from error
    if files is not None:
        if "model_index.json" not in files:
            raise UserError(
                f"model: the folder {str(folder)!r} holds no pipeline (no model_index.json; it has "
                f"{', '.join(files[:5]) or 'nothing'}); give the folder that pipe.save_pretrained "
                "wrote"
            )
        return folder
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "~")):
        raise UserError(
            f"model: there is no folder {name!r}, and no model of that name "
            f"({', '.join(MODELS)}); a model of the Hugging Face hub is written owner/name"
        )
    return name


def load_for_sampling(
    model: str,
    precision: str = "float32",
    *,
    lora: Path | None = None,
    device: str | None = None,
    vae_precision: str | None = None,
    say: Callable[[str], object] = print,
) -> Any:
    """Load a pipeline, with a LoRA if one is named, and put it on its device.

    Args:
        model: what :func:`load_pipeline` takes.
        precision: the precision of all weights.
        lora: what :func:`dgpo.models.loras.load_lora` takes.
        device: ``cpu``, ``cuda``, ``cuda:0``; None for a GPU if there is one.
        vae_precision: the precision of the autoencoder's weights; None for ``precision``.
        say: is told how many tensors of the LoRA fit.

    Raises:
        UserError: it cannot be loaded, the LoRA does not fit, or there is no such device.
    """
    # tried before the model is loaded, which may take minutes
    found = None if lora is None else read_lora(lora)
    quiet()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _try_device(device)
    pipe = load_pipeline(
        model,
        precision,  # pyright: ignore[reportArgumentType]
        vae_precision=vae_precision,  # pyright: ignore[reportArgumentType]
    )
    if found is not None:
        # as rollouts do it: in half precision the sum would lose small changes
        say(put_lora(pipe, found, merge=precision == "float32"))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _try_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"--device {name}: {why}; give cpu, cuda or cuda:0") from error


def quiet() -> None:
    """Switch off the progress bars of diffusers and transformers, which would disturb ours."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
