"""CLIP score: how close a picture is to its prompt, ``100 cos(image, text)``.

Source: Hessel et al., "CLIPScore" (arXiv 2104.08718), without its factor 2.5 and its clipping at
0, as most papers report it. Weights: OpenAI's CLIP ViT-L/14 (``openai/clip-vit-large-patch14``,
1.7 GB), MIT licence. Range [-100, 100], in practice 15 to 40; higher is better.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dgpo.rewards.loading import batches, chosen, device, loading, processors
from dgpo.rewards.reward import Media, Reward, Texts
from dgpo.rewards.wrappers import Lazy

WEIGHTS = "openai/clip-vit-large-patch14"
VARIABLE = "DGPO_CLIP"


class ClipEncoder:
    """A CLIP model with its processors: it turns pictures and texts into unit vectors.

    Args:
        model: a CLIPModel of transformers.
        pixels: its image processor.
        tokens: its tokenizer.
        batch: how many pictures or texts are encoded at once.
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
        from transformers import CLIPModel

        with loading(reward, weights, variable):
            return cls(CLIPModel.from_pretrained(weights), *processors(weights), batch)

    @property
    def width(self) -> int:
        """The size of the vectors."""
        return self.model.config.projection_dim

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors of pictures, float32 [B, D] on the CPU."""

        def encode(some: list[Image.Image]) -> Tensor:
            pixels = self._pixels(some, self.model.device)
            pooled = self.model.vision_model(**pixels).pooler_output
            return self.model.visual_projection(pooled)

        return self._encoded(encode, images)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, float32 [B, D] on the CPU; texts are cut at 77 tokens."""

        def encode(some: list[str]) -> Tensor:
            tokens = self._tokens(
                some, padding=True, truncation=True, max_length=77, return_tensors="pt"
            )
            pooled = self.model.text_model(**tokens.to(self.model.device)).pooler_output
            return self.model.text_projection(pooled)

        return self._encoded(encode, texts)

    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """The cosine of each picture with its text."""
        return (self.images(images) * self.texts(texts)).sum(-1).tolist()

    @torch.no_grad()
    def _encoded(self, encode: Callable[[list[Any]], Tensor], rows: Sequence[Any]) -> Tensor:
        self.model.to(device())
        parts = [encode(some) for (some,) in batches(self._batch, rows)]
        if not parts:
            return torch.zeros(0, self.width)
        return nn.functional.normalize(torch.cat(parts).float(), dim=-1).cpu()


class ClipReward(Reward):
    """A reward that stands on a CLIP model.

    Args:
        encoder: the model.
    """

    def __init__(self, encoder: ClipEncoder) -> None:
        self._encoder = encoder

    def modules(self) -> Iterator[nn.Module]:
        """The CLIP model, and networks of the reward's own."""
        yield self._encoder.model
        yield from super().modules()


class ClipScore(ClipReward):
    """``100 cos(image, text)`` of a CLIP model.

    Args:
        weights: hub id or folder; default: what ``DGPO_CLIP`` says, else the published ViT-L/14.
        batch: how many pictures are scored at once.

    Raises:
        UserError: the model cannot be loaded.
    """

    name = "clip"

    def __init__(self, weights: str | None = None, batch: int = 32) -> None:
        super().__init__(shared_encoder(weights, batch))

    def __call__(self, images: Media, prompts: Texts, **columns: Any) -> list[float]:
        """One score for each picture."""
        return [100 * cosine for cosine in self._encoder.cosines(images, prompts)]


def shared_encoder(weights: str | None = None, batch: int = 32) -> ClipEncoder:
    """The one copy in memory for all rewards that stand on the same CLIP model.

    Args:
        weights: hub id or folder; default: what ``DGPO_CLIP`` says, else the published ViT-L/14.
        batch: how many pictures or texts are encoded at once.

    Raises:
        UserError: the model cannot be loaded.
    """
    return _shared(chosen(weights, VARIABLE, WEIGHTS), batch)


@functools.cache
def _shared(weights: str, batch: int) -> ClipEncoder:
    return ClipEncoder.load(weights, "clip", VARIABLE, batch)


clip = Lazy(ClipScore)
