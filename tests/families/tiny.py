"""Tiny random pipelines of diffusers, made in code: no download, a second to build.

``build(name)`` gives the pipeline; ``TINY[name]`` also says how big a picture to ask for. Nearly
all have real, if tiny, text encoders with a word-level tokenizer; the others are given random
embeddings by ``conditioning``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.prompt_encoder import Conditioning
from families.audio import AUDIO
from families.edit import EDIT
from families.image import IMAGE, sd3, sd3_small, sd15
from families.image_flow import IMAGE_FLOW
from families.parts import Tiny
from families.video import VIDEO

TINY: dict[str, Tiny] = {**IMAGE, **IMAGE_FLOW, **VIDEO, **AUDIO, **EDIT}
FAST = [name for name, tiny in TINY.items() if tiny.fast]
PROMPTS = ("a photo of cat", "red dog on the small blue house", "big table", "the cat")


def build(name: str) -> Any:
    """The tiny pipeline called ``name``, the same one every time."""
    return TINY[name].pipeline()


class _RandomEncoder:
    """Stands for text encoders that are not built."""

    def __init__(self, name: str) -> None:
        self._make = TINY[name].embeddings

    def encode(self, prompts: Sequence[str], guidance: bool) -> Conditioning:
        assert self._make is not None
        cond = Conditioning(self._make(len(prompts), 10), len(prompts))
        return Conditioning(cond.call_kwargs(guidance), cond.size)


def tiny_model(name: str, pipe: Any = None) -> PipelineModel:
    """The model of a tiny pipeline, which encodes prompts even where its encoders are missing."""
    model = PipelineModel(build(name) if pipe is None else pipe, call=TINY[name].call)
    if TINY[name].embeddings is not None:
        vars(model)["_encoder"] = _RandomEncoder(name)
    return model


def conditioning(name: str, model: Any, size: int = 2, seed: int = 10) -> Conditioning:
    """Conditioning with a negative prompt, from prompts or from random embeddings."""
    make = TINY[name].embeddings
    if make is None:
        return model.encode([PROMPTS[i % len(PROMPTS)] for i in range(size)], guidance=True)
    return Conditioning(make(size, seed), size)


__all__ = [
    "FAST",
    "PROMPTS",
    "TINY",
    "Tiny",
    "build",
    "conditioning",
    "sd3",
    "sd3_small",
    "sd15",
    "tiny_model",
]
