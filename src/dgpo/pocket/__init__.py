"""The pocket: small, genuine text-to-image models with exact verifiers.

Two :class:`diffusers.StableDiffusion3Pipeline` of one architecture come with the package: one
draws scenes of coloured shapes, one draws signs with digits.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dgpo.errors import UserError

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

WEIGHTS = Path(__file__).parent / "weights"
"""The folder with one pipeline folder a skill; ``from_pretrained`` reads each of them."""


def load_pocket(skill: str = "scenes") -> StableDiffusion3Pipeline:
    """The pipeline that draws scenes (``skill="scenes"``) or signs (``skill="signs"``).

    Raises:
        UserError: there is no such skill.
    """
    if not (WEIGHTS / skill / "model_index.json").is_file():
        have = sorted(path.parent.name for path in WEIGHTS.glob("*/model_index.json"))
        raise UserError(f"pocket: no skill {skill!r}; there is {', '.join(have) or 'none yet'}")
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(WEIGHTS / skill)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pocket_signs() -> StableDiffusion3Pipeline:
    """The pipeline that draws signs with digits."""
    return load_pocket("signs")
