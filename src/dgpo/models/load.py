"""From the ``model`` of a recipe to a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from dgpo.errors import UserError
from dgpo.registry import MODELS, resolve

Precision = Literal["float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(name: str, precision: Precision = "float32") -> Any:
    """The pipeline that a recipe calls ``model``.

    Args:
        name: a registered name (``pocket``), ``package.module:function``, a folder written by
            ``save_pretrained``, or the id of a model on the Hugging Face hub.
        precision: of all weights.

    Raises:
        UserError: the folder holds no pipeline, or the hub has none of this name.
    """
    if precision not in _DTYPES:
        raise UserError(f"precision: {precision!r} is not one of {', '.join(_DTYPES)}")
    dtype = _DTYPES[precision]
    if name in MODELS or ":" in name:
        make: Any = resolve("model", name)
        pipe = make()
        return pipe if dtype == torch.float32 else pipe.to(dtype)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _load_folder(folder, dtype)
    if not _may_be_hub_id(name):
        raise UserError(
            f"model: there is no folder {name!r}, and no model of that name "
            f"({', '.join(MODELS)}); a model of the Hugging Face hub is written owner/name"
        )
    try:
        return DiffusionPipeline.from_pretrained(name, torch_dtype=dtype)
    except OSError as error:
        raise UserError(
            f"model: cannot load {name!r} from the Hugging Face hub ({_first_line(error)}). Is "
            "the name right, the licence accepted and `hf auth login` done? No folder of that name "
            "exists either"
        ) from error


def _load_folder(folder: Path, dtype: torch.dtype) -> Any:
    if not (folder / "model_index.json").is_file():
        found = sorted(path.name for path in folder.iterdir())[:5]
        raise UserError(
            f"model: the folder {str(folder)!r} holds no pipeline (no model_index.json; it has "
            f"{', '.join(found) or 'nothing'}); give the folder that pipe.save_pretrained wrote"
        )
    return DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)


def _may_be_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~"))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
