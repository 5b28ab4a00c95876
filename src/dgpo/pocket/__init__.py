"""The pocket is a set of small, genuine text-to-image models with exact verifiers.

Two :class:`diffusers.StableDiffusion3Pipeline` of one architecture come with the package: one
draws scenes of coloured shapes, the other draws signs with digits. A third model, a
:class:`diffusers.StableDiffusionPipeline` that predicts noise, draws scenes too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgpo.errors import UserError

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

WEIGHTS = Path(__file__).parent / "weights"
"""The folder with a folder for each pipeline, which ``from_pretrained`` reads."""

_SKILLS = ("scenes", "signs")
_NOISE_PREDICTION = "scenes-sd"


def load_pocket(skill: str = "scenes") -> StableDiffusion3Pipeline:
    """Load the pipeline that draws scenes (``skill="scenes"``) or signs (``skill="signs"``).

    Raises:
        UserError: there is no such skill.

    >>> import torch
    >>> pipe = load_pocket()
    >>> seeded = torch.Generator().manual_seed(0)
    >>> made = pipe("a photo of a red circle", num_inference_steps=4, generator=seeded)
    >>> made.images[0].size
    (32, 32)
    """
    if skill not in _SKILLS:
        raise UserError(f"pocket: unknown skill {skill!r}; choose {' or '.join(_SKILLS)}")
    from diffusers import StableDiffusion3Pipeline

    name = "pocket" if skill == _SKILLS[0] else f"pocket-{skill}"
    return _quiet(StableDiffusion3Pipeline.from_pretrained(WEIGHTS / skill), name)


def load_pocket_signs() -> StableDiffusion3Pipeline:
    """Load the pipeline that draws signs with digits."""
    return load_pocket("signs")


def load_pocket_sd() -> StableDiffusionPipeline:
    """Load the noise-prediction pipeline that draws scenes."""
    from diffusers import StableDiffusionPipeline

    return _quiet(StableDiffusionPipeline.from_pretrained(WEIGHTS / _NOISE_PREDICTION), "pocket-sd")


def _quiet(pipe: Any, name: str) -> Any:
    """Return the pipeline without progress bars and under its registered name: a recipe on another
    machine would not find this machine's folder."""
    pipe.register_to_config(_name_or_path=name)
    pipe.set_progress_bar_config(disable=True)
    return pipe
