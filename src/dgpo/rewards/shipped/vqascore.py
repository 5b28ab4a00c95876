"""VQAScore: how sure a vision-language model is that a picture shows its prompt.

Source: Lin et al., "Evaluating Text-to-Visual Generation with Image-to-Text Generation"
(arXiv 2404.01291), with LLaVA-1.5-7B, one of the paper's models (its CLIP-FlanT5 is not in
transformers). Weights: ``llava-hf/llava-1.5-7b-hf`` (14 GB), Llama 2 community licence. Range
[0, 1], higher is better.

As in the published program, a picture is padded to a square of the processor's mean colour, and the
system message that the model was trained with comes before the question.

Differs from the paper: the weights are transformers' conversion, in the 7B size where the paper's
tables have 13B. The published program scores ``Yes`` and the end of the answer, by the geometric
mean of their probabilities; here it is the paper's formula, ``P("Yes")`` alone. The published
weights have not been run here, so that scores have not been compared.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dgpo.errors import UserError
from dgpo.pictures import rgb
from dgpo.rewards.loading import ModelReward, loading, mean_color, pad_square, precision
from dgpo.rewards.wrappers import Lazy

WEIGHTS = "llava-hf/llava-1.5-7b-hf"
VARIABLE = "DGPO_VQASCORE"
QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
"""The paper's question."""
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""The message that LLaVA-1.5 was trained with."""


class VQAScore(ModelReward):
    """``P("Yes" | picture, question)``: the probability of the answer's first token.

    Args:
        weights: hub id or folder of any model for ``AutoModelForImageTextToText`` whose processor
            has a chat template; default: what ``DGPO_VQASCORE`` says, else LLaVA-1.5-7B.
        question: ``{prompt}`` in it becomes the caption.
        answer: the text whose first token is looked at.
        system: the message before the question; empty for none.
        pad: whether pictures are padded to squares, not cropped.
        dtype: the weights' type; None: float32 on a CPU, bfloat16 on a GPU.

    Raises:
        UserError: the model cannot be loaded, or has no chat template.
    """

    name = "vqascore"

    def __init__(
        self,
        weights: str | None = None,
        question: str = QUESTION,
        answer: str = "Yes",
        system: str = SYSTEM,
        pad: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        with loading(self.name, weights, VARIABLE, WEIGHTS) as place:
            model: Any = AutoModelForImageTextToText.from_pretrained(
                place, dtype=dtype or precision()
            )
            self._processor: Any = AutoProcessor.from_pretrained(place, use_fast=False)
        if not getattr(self._processor, "chat_template", None):
            raise UserError(
                f"reward 'vqascore': the processor of {place!r} has no chat template, so the "
                f"question cannot be put to it; {WEIGHTS} has one"
            )
        self._model = model.eval().requires_grad_(False)
        tokens = self._processor.tokenizer.encode(answer, add_special_tokens=False)
        self._token, self._question, self._system = tokens[0], question, system
        images = getattr(self._processor, "image_processor", None)
        self._color = mean_color(images) if pad else None

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """The probability of the answer for one picture, [1]; nothing is generated."""
        (image,), (prompt,) = images, prompts
        question = self._question.replace("{prompt}", prompt)
        said = {"type": "text", "text": self._system}
        turns = [{"role": "system", "content": [said]}] if self._system else []
        asked = [{"type": "image"}, {"type": "text", "text": question}]
        turns.append({"role": "user", "content": asked})
        text = self._processor.apply_chat_template(turns, add_generation_prompt=True)
        shown = rgb(image) if self._color is None else pad_square(image, self._color)
        inputs = self._processor(text=[text], images=[shown], return_tensors="pt").to(
            self._model.device, self._model.dtype
        )
        last = self._model(**inputs).logits[:, -1].float()
        return last.softmax(-1)[:, self._token]


vqascore = Lazy(VQAScore)
