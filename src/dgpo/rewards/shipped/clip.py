"""CLIP score: how close a picture is to its prompt, ``100 cos(image, text)``.

Source: Hessel et al., "CLIPScore" (arXiv 2104.08718), without its factor 2.5 and its clipping at
0, as most papers report it. Weights: OpenAI's CLIP ViT-L/14 (``openai/clip-vit-large-patch14``,
1.7 GB), MIT licence. Range [-100, 100], in practice 15 to 40; higher is better.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dgpo.rewards.loading import Lazy, batches, chosen, device, loading

WEIGHTS = "openai/clip-vit-large-patch14"
VARIABLE = "DGPO_CLIP"


class ClipEncoder:
    """A CLIP model with its processors: pictures and texts to unit vectors.

    Args:
        model: a CLIPModel of transformers.
        pixels: its image processor.
        tokens: its tokenizer.
        batch: pictures or texts encoded at once.
    """

    def __init__(self, model: Any, pixels: Any, tokens: Any, batch: int = 32) -> None:
        self.model = model.eval().requires_grad_(False)
        self._pixels = pixels
        self._tokens = tokens
        self._batch = batch

    @classmethod
    def load(cls, weights: str, reward: str, variable: str, batch: int = 32) -> ClipEncoder:
        """Load a hub id or folder; ``reward`` and ``variable`` are what errors name.

        Raises:
            UserError: it cannot be loaded.
        """
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        with loading(reward, weights, variable):
            return cls(
                CLIPModel.from_pretrained(weights),
                AutoImageProcessor.from_pretrained(weights, use_fast=False),
                AutoTokenizer.from_pretrained(weights),
                batch,
            )

    @property
    def width(self) -> int:
        """Size of the vectors."""
        return self.model.config.projection_dim

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors of pictures, float32 [B, D] on the CPU."""
        self.model.to(device())
        parts = []
        for (some,) in batches(self._batch, images):
            pixels = self._pixels([image.convert("RGB") for image in some], return_tensors="pt")
            pooled = self.model.vision_model(**pixels.to(self.model.device)).pooler_output
            parts.append(self.model.visual_projection(pooled))
        return _unit(parts, self.width)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, float32 [B, D] on the CPU; texts are cut at 77 tokens."""
        self.model.to(device())
        parts = []
        for (some,) in batches(self._batch, texts):
            tokens = self._tokens(
                some, padding=True, truncation=True, max_length=77, return_tensors="pt"
            )
            pooled = self.model.text_model(**tokens.to(self.model.device)).pooler_output
            parts.append(self.model.text_projection(pooled))
        return _unit(parts, self.width)

    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """The cosine of each picture with its text."""
        return (self.images(images) * self.texts(texts)).sum(-1).tolist()


def _unit(parts: list[Tensor], width: int) -> Tensor:
    if not parts:
        return torch.zeros(0, width)
    return torch.nn.functional.normalize(torch.cat(parts).float(), dim=-1).cpu()


class ClipScore:
    """``100 cos(image, text)`` of a CLIP model.

    Args:
        weights: hub id or folder; default: what ``DGPO_CLIP`` says, else the published ViT-L/14.
        batch: pictures scored at once.

    Raises:
        UserError: the model cannot be loaded.
    """

    __name__ = "clip"

    def __init__(self, weights: str | None = None, batch: int = 32) -> None:
        self._encoder = shared_encoder(chosen(weights, VARIABLE, WEIGHTS), batch)

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], **columns: Any
    ) -> list[float]:
        """One score for each picture."""
        return [100 * cosine for cosine in self._encoder.cosines(images, prompts)]


@functools.cache
def shared_encoder(weights: str, batch: int = 32) -> ClipEncoder:
    """One copy in memory for all rewards that stand on the same CLIP model."""
    return ClipEncoder.load(weights, "clip", VARIABLE, batch)


clip = Lazy("clip", ClipScore)
