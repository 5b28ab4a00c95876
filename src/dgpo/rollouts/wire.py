"""What travels between the loop and an engine: JSON for the question, safetensors for the answer.

A request is a JSON object with the keys of :class:`Ask`. Weights are the file that diffusers reads
by ``load_lora_weights``. An answer holds ``x0`` [B, ...], ``images`` (uint8, [B, H, W, 3]),
``timesteps`` [n] and ``sigmas`` (float64, [n]). Nothing is ever pickled.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load, save

from dgpo.core.process import Level
from dgpo.errors import UserError
from dgpo.models.pipeline import Rollout


class Ask(BaseModel):
    """A batch of pictures, as it travels."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    texts: list[str] = Field(min_length=1, max_length=4096)
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]]
    steps: int = Field(ge=1, le=10_000)
    guidance_scale: float = Field(ge=0)
    scheduler: str | None
    """By its name in a recipe; null: the pipeline's own."""
    call: dict[str, Any]
    """Further arguments of the pipeline's call."""
    weights: str | None
    """The SHA-256 of the LoRA file that must be in place; null: the model as it was."""


def pack(made: Rollout) -> bytes:
    """A rollout with pictures as safetensors."""
    assert made.images is not None
    pictures = np.stack([np.asarray(image.convert("RGB")) for image in made.images])
    tensors = {
        "x0": made.x0.cpu().contiguous(),
        "images": torch.from_numpy(pictures),
        "timesteps": torch.stack([level.timestep.cpu() for level in made.levels]),
        "sigmas": torch.tensor([level.sigma for level in made.levels], dtype=torch.float64),
    }
    return save(tensors)


def unpack(data: bytes, rows: int) -> Rollout:
    """The rollout in an answer.

    Raises:
        UserError: it is none, or has another number of rows.
    """
    try:
        found = load(data)
        x0, images = found["x0"], found["images"]
        sigmas, timesteps = found["sigmas"].double().tolist(), found["timesteps"]
        if len(x0) != rows or len(images) != rows or len(sigmas) != len(timesteps) or not sigmas:
            raise ValueError(f"{len(x0)} samples and {len(images)} pictures for {rows} rows")
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"pictures of {images.dtype} {tuple(images.shape)}")
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"rollout.engine: its answer is no rollout ({error})") from error
    levels = [Level(t, s) for t, s in zip(timesteps, sigmas, strict=True)]
    return Rollout(x0, [Image.fromarray(image.numpy()) for image in images], levels)
