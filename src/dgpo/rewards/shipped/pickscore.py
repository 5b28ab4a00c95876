"""PickScore: how much people prefer a picture for a prompt, learned from their choices.

Source: Kirstain et al., "Pick-a-Pic" (arXiv 2305.01569). Weights: MIT licence on the hub
(``yuvalkirstain/PickScore_v1``, 4 GB). Higher is better; about 16 to 26.
"""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from dgpo.rewards.loading import ModelReward, chosen, loading, processors
from dgpo.rewards.wrappers import Lazy

WEIGHTS = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The published checkpoint has no processor of its own; it was trained with this one's."""
VARIABLE = "DGPO_PICKSCORE"


class PickScore(ModelReward):
    """``exp(logit_scale) cos(image, text)`` of a CLIP model.

    Args:
        weights: hub id or folder of a CLIP model; the default is the published one, or what the
            environment variable ``DGPO_PICKSCORE`` says (a folder, where the hub is out of reach).
        processor: hub id or folder of its tokenizer and image processor; the default is the
            published one, or ``weights`` when that was given.
        batch: how many pictures are scored at once.

    Raises:
        UserError: they cannot be loaded.
    """

    name = "pickscore"

    def __init__(
        self, weights: str | None = None, processor: str | None = None, batch: int = 16
    ) -> None:
        from transformers import CLIPModel

        with loading(self.name, weights, VARIABLE, WEIGHTS) as place:
            model: Any = CLIPModel.from_pretrained(place)
            processor = processor or chosen(weights, VARIABLE, PROCESSOR)
            self._images, self._tokens = processors(processor)
        self._model = model.eval().requires_grad_(False)
        self.batch = batch

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """The scaled cosine of each picture with its prompt, [B]."""
        pixels = self._images(images, self._model.device)
        tokens = self._tokens(
            prompts, padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        outputs = self._model(**pixels, **tokens.to(self._model.device))
        cosine = (outputs.image_embeds * outputs.text_embeds).sum(-1)  # both are unit vectors
        return (self._model.logit_scale.exp() * cosine).float()


pickscore = Lazy(PickScore)
"""The published model's score; its weights are loaded at the first call or check."""
