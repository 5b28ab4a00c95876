"""PickScore: how much people prefer a picture for a prompt, learned from their choices.

Source: Kirstain et al., "Pick-a-Pic" (arXiv 2305.01569). Weights: MIT licence on the hub
(``yuvalkirstain/PickScore_v1``, 4 GB). Higher is better; about 16 to 26.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from dgpo.errors import UserError
from dgpo.rewards.loading import Lazy

WEIGHTS = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The published checkpoint has no processor of its own; it was trained with this one's."""


class PickScore:
    """``exp(logit_scale) cos(image, text)`` of a CLIP model.

    Args:
        weights: hub id or folder of a CLIP model; the default is the published one, or what the
            environment variable ``DGPO_PICKSCORE`` says (a folder, where the hub is out of reach).
        processor: hub id or folder of its tokenizer and image processor; the default is the
            published one, or ``weights`` when that was given.
        batch: pictures scored at once.

    Raises:
        UserError: they cannot be loaded.
    """

    __name__ = "pickscore"

    def __init__(
        self, weights: str | None = None, processor: str | None = None, batch: int = 16
    ) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        given = weights or os.environ.get("DGPO_PICKSCORE")
        processor = processor or given or PROCESSOR
        try:
            model: Any = CLIPModel.from_pretrained(given or WEIGHTS)
            self._images: Any = AutoImageProcessor.from_pretrained(processor, use_fast=False)
            self._tokens: Any = AutoTokenizer.from_pretrained(processor)
        except OSError as error:
            raise UserError(
                f"reward 'pickscore': cannot load {given or WEIGHTS!r} ({str(error)[:200]}); "
                "download it and set DGPO_PICKSCORE to its folder"
            ) from error
        self._model = model.eval().requires_grad_(False)
        self._batch = batch

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], **columns: Any
    ) -> list[float]:
        """One score for each picture."""
        # the first call comes after the policy's device is in use: follow it to the GPU
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")
        scores: list[float] = []
        for start in range(0, len(images), self._batch):
            rows = slice(start, start + self._batch)
            scores += self._score(list(images[rows]), list(prompts[rows]))
        return scores

    def _score(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        pixels = self._images([i.convert("RGB") for i in images], return_tensors="pt")
        tokens = self._tokens(
            prompts, padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        outputs = self._model(**pixels.to(self._model.device), **tokens.to(self._model.device))
        cosine = (outputs.image_embeds * outputs.text_embeds).sum(-1)  # both are unit vectors
        return (self._model.logit_scale.exp() * cosine).float().tolist()


pickscore = Lazy("pickscore", PickScore)
"""The published model's score; its weights are loaded at the first call or check."""
