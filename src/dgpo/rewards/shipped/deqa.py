"""DeQA-Score: the technical quality of a picture (sharpness, noise, artefacts); not its prompt.

Source: You et al., "DeQA-Score" (arXiv 2501.11561), with the question and the five levels of its
training. Weights: ``zhiyuanyou/DeQA-Score-Mix3`` on mPLUG-Owl2 (16 GB), MIT. Range 1 (bad) to 5
(excellent); higher is better.

The model's class is not in transformers: it comes as Python files in the weights' repository, and
loading it runs them with your rights. dgpo does not do that unless it is asked to by name: read the
files, then set ``DGPO_TRUST_REMOTE_CODE=deqa`` (or ``DeQA(trust_remote_code=True)``), best with
``DGPO_DEQA`` at a folder whose files do not change. They were written for transformers 4.36 and
have not been tried with the pinned one here; attention is ``eager``, as the authors load it. Where
they fail, an error says so: serve the model from an environment of its own.

Differs from the paper: of the predicted distribution only the mean is used, and it is computed in
float32, where the authors' program takes half precision.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dgpo.errors import UserError
from dgpo.rewards.loading import ModelReward, chosen, loading, mean_color, pad_square, precision
from dgpo.rewards.wrappers import Lazy

WEIGHTS = "zhiyuanyou/DeQA-Score-Mix3"
VARIABLE = "DGPO_DEQA"
CONSENT = "DGPO_TRUST_REMOTE_CODE"
QUESTION = (
    "USER: How would you rate the quality of this image?\n",
    "\nASSISTANT: The quality of the image is",
)
"""The paper's question, before and after the picture."""
LEVELS = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}
PICTURE = -200
"""mPLUG-Owl2's token number for the place of the picture."""


class DeQA(ModelReward):
    """``sum over levels of value * P(level)``: the expected quality level.

    ``P`` is the softmax over the five levels' first tokens of the logits that follow the question.

    Args:
        weights: hub id or folder; default: what ``DGPO_DEQA`` says, else the published one.
        trust_remote_code: run the Python files that come with the weights; default: whether
            ``DGPO_TRUST_REMOTE_CODE`` names ``deqa``.
        revision: a commit of the hub repository, so that its files cannot change.
        batch: how many pictures are scored at once.

    Raises:
        UserError: running the files was not agreed to, or the model cannot be loaded.
    """

    name = "deqa"

    def __init__(
        self,
        weights: str | None = None,
        trust_remote_code: bool | None = None,
        revision: str | None = None,
        batch: int = 8,
    ) -> None:
        place = chosen(weights, VARIABLE, WEIGHTS)
        if trust_remote_code is None:
            trust_remote_code = "deqa" in os.environ.get(CONSENT, "").replace(",", " ").split()
        if not trust_remote_code:
            raise UserError(
                f"reward 'deqa': {place!r} is not a class of transformers: loading it runs the "
                f"Python files of its repository. Read them, then set {CONSENT}=deqa to agree"
            )
        from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor

        self._place = place
        fixed: dict[str, Any] = {"revision": revision or "main"}
        with loading(self.name, place, VARIABLE), _files_run(place):
            model: Any = AutoModelForCausalLM.from_pretrained(
                place,
                trust_remote_code=True,
                attn_implementation="eager",  # the files know no other
                dtype=precision(torch.float16),
                **fixed,
            )
        with loading(self.name, place, VARIABLE):
            tokens: Any = AutoTokenizer.from_pretrained(place, use_fast=False, **fixed)
            self._pixels: Any = CLIPImageProcessor.from_pretrained(place, **fixed)
        self._model = model.eval().requires_grad_(False)
        self.batch = batch
        self._question = _question(tokens)
        self._levels = [_plain(tokens, word)[0] for word in LEVELS]

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """The expected levels, [B].

        Raises:
            UserError: the model's own files do not run with this transformers.
        """
        color = mean_color(self._pixels)
        padded = [pad_square(image, color) for image in images]
        pixels = self._pixels(padded, return_tensors="pt")["pixel_values"]  # [B, 3, H, W]
        pixels = pixels.to(self._model.device, self._model.dtype)
        ids = torch.tensor([self._question] * len(images), device=pixels.device)
        with _files_run(self._place):
            logits = self._model(input_ids=ids, images=pixels).logits
        levels = logits[:, -1, self._levels].float().softmax(-1)
        return levels.cpu() @ torch.tensor(list(LEVELS.values()))


@contextlib.contextmanager
def _files_run(place: str) -> Iterator[None]:
    """Say what can be done where the files ask transformers for what it has no more."""
    try:
        yield
    except (AttributeError, TypeError, ImportError, NotImplementedError) as error:
        import transformers

        reason = " ".join(str(error).split())[:240]
        raise UserError(
            f"reward 'deqa': the Python files of {place!r} do not run with transformers "
            f"{transformers.__version__} ({type(error).__name__}: {reason}). They were written for "
            "4.36 and eager attention, which is set: install what they miss, or let a server in an "
            "environment with transformers 4.36 answer POST /v1/score (docs/rewards.md, Serve) and "
            "ask it by the reward http"
        ) from error


def _question(tokens: Any) -> list[int]:
    before, after = (_plain(tokens, text) for text in QUESTION)
    start = [] if tokens.bos_token_id is None else [tokens.bos_token_id]
    return [*start, *before, PICTURE, *after]


def _plain(tokens: Any, text: str) -> list[int]:
    return tokens(text, add_special_tokens=False)["input_ids"]


deqa = Lazy(DeQA)
