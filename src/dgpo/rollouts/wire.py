"""The loop and an engine exchange JSON for the question and safetensors for the answer.

A request is a JSON object with the keys of :class:`Ask`. Weights are a file that diffusers reads by
``load_lora_weights``; their name is :func:`hash_of` the file. An answer holds ``x0`` [B, ...],
``images`` (uint8, [B, H, W, 3]), ``lost`` (bool, [B]: which of them may not be scored; may be
left out), ``timesteps`` [n], ``sigmas`` (float64, [n]) and ``weights`` (uint8, [32]; [0] if there
are none). Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load, save

from dgpo.core.process import Level
from dgpo.errors import UserError
from dgpo.media import Lost, made_of
from dgpo.models.pipeline.rollout import Rollout
from dgpo.pictures import Picture, array_of, rgb


class Ask(BaseModel):
    """An ``Ask`` is the request for a batch of pictures, as it travels."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    texts: list[str] = Field(min_length=1, max_length=4096)
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]]
    steps: int = Field(ge=1, le=10_000)
    guidance_scale: float = Field(ge=0)
    scheduler: str | None
    """The sampler's name in a recipe; null: the pipeline's own."""
    call: dict[str, Any]
    """Additional arguments for the pipeline's call."""
    weights: str | None
    """:func:`hash_of` the LoRA that must be in place; null: the model as it was."""


def hash_of(data: bytes) -> str:
    """Return the name of a safetensors file: a SHA-256 of its tensors in the order of their names.

    It covers names, dtypes, shapes and numbers. The bytes of the file will not do, because its
    header has another order each time that the same tensors are written.

    Raises:
        UserError: the data is no safetensors file.

    >>> hash_of(save({"a": torch.zeros(2), "b": torch.ones(3)}))[:12]
    '81b3937a8c60'
    """
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"the weights are not a safetensors file ({error})") from error
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pack(made: Rollout, weights: str | None = None) -> bytes:
    """Write a rollout with its pictures as safetensors.

    Args:
        made: the rollout.
        weights: :func:`hash_of` the LoRA that made it; None for the model without a LoRA.
    """
    assert made.images is not None
    pictures = np.stack([array_of(rgb(made_of(image))) for image in made.images])
    tensors = {
        "x0": made.x0.cpu().contiguous(),
        "images": torch.from_numpy(pictures),
        "lost": torch.tensor([isinstance(image, Lost) for image in made.images]),
        "timesteps": torch.stack([level.timestep.cpu() for level in made.levels]),
        "sigmas": torch.tensor([level.sigma for level in made.levels], dtype=torch.float64),
        "weights": torch.tensor(list(bytes.fromhex(weights or "")), dtype=torch.uint8),
    }
    return save(tensors)


def unpack(data: bytes, rows: int, weights: str | None = None) -> Rollout:
    """Read the rollout in an answer.

    Args:
        data: the answer.
        rows: how many rows were asked for.
        weights: :func:`hash_of` the LoRA that must have made it; None for no LoRA.

    Raises:
        UserError: the answer is no rollout, has another number of rows, or other weights made it.

    >>> from PIL import Image
    >>> picture = Image.new("RGB", (8, 8), "red")
    >>> made = Rollout(torch.zeros(1, 4, 2, 2), [picture], [Level(torch.tensor(1000.0), 1.0)])
    >>> again = unpack(pack(made), rows=1)
    >>> again.x0.shape, again.images[0].getpixel((0, 0)), again.levels[0].sigma
    (torch.Size([1, 4, 2, 2]), (255, 0, 0), 1.0)
    """
    try:
        found = load(data)
        x0, images = found["x0"], found["images"]
        sigmas, timesteps = found["sigmas"].double().tolist(), found["timesteps"]
        if len(x0) != rows or len(images) != rows or len(sigmas) != len(timesteps) or not sigmas:
            raise ValueError(f"{len(x0)} samples and {len(images)} pictures for {rows} rows")
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"pictures of {images.dtype} {tuple(images.shape)}")
        used = bytes(found["weights"].tolist()).hex()
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"rollout.engine: its answer is no rollout ({error})") from error
    if used != (weights or ""):
        raise UserError(
            f"rollout.engine: the pictures were made with {_called(used)}, but "
            f"{_called(weights)} was sent: perhaps another run uses the server"
        )
    levels = [Level(t, s) for t, s in zip(timesteps, sigmas, strict=True)]
    # a server need not say what is lost, but then it must not send black pictures either
    lost = found.get("lost", torch.zeros(rows, dtype=torch.bool)).tolist()
    shown = zip(map(Picture, images), lost, strict=True)
    pictures = [Lost("the server says so", one) if gone else one for one, gone in shown]
    return Rollout(x0, pictures, levels)


def _called(weights: str | None) -> str:
    return f"the LoRA {weights[:12]}" if weights else "no LoRA"
