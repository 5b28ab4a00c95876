"""Check a pipeline of a skill while it is trained, and write it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tools.pretrain.skills import Skill


def check_pipeline(
    pipe: Any,
    skill: Skill,
    grid: Path,
    guidances: tuple[float, ...] = (1.0, 3.0),
    call: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Sample the held-out rows and measure how often they are right.

    Args:
        pipe: the pipeline.
        skill: the task.
        grid: the file for a grid of the samples without guidance.
        guidances: the guidance scales to sample with.
        call: additional arguments of the pipeline; None: one token for the silent encoder.

    Returns:
        For each scale the mean over categories and the share of objects that are recognised, and
        without guidance the success of each category.
    """
    figures: dict[str, float] = {}
    rows = skill.held_out
    for guidance in guidances:
        made = pipe(
            [row["prompt"] for row in rows],
            num_inference_steps=10,
            guidance_scale=guidance,
            height=skill.height,
            width=skill.width,
            generator=torch.Generator().manual_seed(3),
            output_type="np",
            **({"max_sequence_length": 1} if call is None else call),
        ).images
        images = (np.asarray(made) * 255).round().astype(np.uint8)
        right = skill.right(images, rows)
        tags = [row.get("tag", "all") for row in rows]
        by_tag = {
            tag: float(np.mean([r for r, t in zip(right, tags, strict=True) if t == tag]))
            for tag in dict.fromkeys(tags)
        }
        name = f"cfg{guidance:g}"
        figures[name] = float(np.mean(list(by_tag.values())))
        figures[f"{name}_known"] = skill.known(images)
        if guidance == 1.0:
            figures |= by_tag
            _draw(images, grid)
    return figures


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Write a pipeline folder that the stock ``from_pretrained`` loads."""
    shutil.rmtree(folder, ignore_errors=True)
    vae: Any = pipe.vae
    vae.to(memory_format=torch.contiguous_format)
    pipe.save_pretrained(folder)


def _draw(images: np.ndarray, file: Path, columns: int = 20, scale: int = 3) -> None:
    height, width = images.shape[1:3]
    chosen = images[: len(images) // columns * columns]
    table = chosen.reshape(-1, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    sheet = Image.fromarray(table.reshape(-1, columns * width, 3))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(file)
