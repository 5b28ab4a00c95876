"""Size of a picture as a JPEG file: rewards without a model, for trying an algorithm out.

Source: Black et al., "Training Diffusion Models with Reinforcement Learning" (arXiv 2305.13301):
kilobytes (1,000 bytes) at quality 95. Licence: this project's own. Range of the incompressibility
[0, inf), about 20 to 300 for 512 x 512; the compressibility is its negative. Higher is better.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from dgpo.pictures import rgb

QUALITY = 95


def kilobytes(image: Image.Image) -> float:
    """The size of a picture as a JPEG, in 1,000 bytes."""
    buffer = io.BytesIO()
    rgb(image).save(buffer, "JPEG", quality=QUALITY)
    return buffer.tell() / 1000


def jpeg_incompressibility(
    images: Sequence[Image.Image], prompts: Sequence[str], **columns: Any
) -> list[float]:
    """The size in kilobytes, which rewards detail and noise."""
    return [kilobytes(image) for image in images]


def jpeg_compressibility(
    images: Sequence[Image.Image], prompts: Sequence[str], **columns: Any
) -> list[float]:
    """The negative size in kilobytes, which rewards smooth pictures."""
    return [-kilobytes(image) for image in images]
