"""DeQA-Score: the technical quality of a picture (sharpness, noise, artefacts); not its prompt.

Source: You et al., "DeQA-Score" (arXiv 2501.11561). Weights: ``zhiyuanyou/DeQA-Score-Mix3`` on
mPLUG-Owl2 (16 GB), MIT. Range 1 (bad) to 5 (excellent); higher is better.

The model's class is not in transformers: it comes as Python files in the weights' repository, and
loading it runs them with your rights. dgpo does not do that unless it is asked to by name: read the
files, then set ``DGPO_TRUST_REMOTE_CODE=deqa`` (or ``DeQA(trust_remote_code=True)``), best with
``DGPO_DEQA`` at a folder whose files do not change. They were written for transformers 4.36 and
have not been tried with the pinned one here; attention is ``eager``, as the authors load it. Where
they fail, an error says so: serve the model from an environment of its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from dgpo.errors import UserError
from dgpo.rewards.loading import Lazy, batches, chosen, device, loading

WEIGHTS = "zhiyuanyou/DeQA-Score-Mix3"
VARIABLE = "DGPO_DEQA"
CONSENT = "DGPO_TRUST_REMOTE_CODE"


class DeQA:
    """The expected quality level by the model's own ``score``.

    Args:
        weights: hub id or folder; default: what ``DGPO_DEQA`` says, else the published one.
        trust_remote_code: run the Python files that come with the weights; default: whether
            ``DGPO_TRUST_REMOTE_CODE`` names ``deqa``.
        revision: a commit of the hub repository, so that its files cannot change.
        batch: pictures scored at once.

    Raises:
        UserError: running the files was not agreed to, or the model cannot be loaded.
    """

    __name__ = "deqa"

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
        from transformers import AutoModelForCausalLM

        self._place = place
        with loading(self.__name__, place, VARIABLE), _files_run(place):
            model: Any = AutoModelForCausalLM.from_pretrained(
                place,
                trust_remote_code=True,
                revision=revision or "main",
                attn_implementation="eager",  # the files know no other
                torch_dtype=torch.float16 if torch.cuda.is_available() else torch.float32,
            )
        if not hasattr(model, "score"):
            raise UserError(f"reward 'deqa': the model of {place!r} has no method 'score'")
        self._model = model.eval().requires_grad_(False)
        self._batch = batch

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], **columns: Any
    ) -> list[float]:
        """One score for each picture.

        Raises:
            UserError: the model's own files do not run with this transformers.
        """
        self._model.to(device())
        scores: list[float] = []
        for (some,) in batches(self._batch, images):
            with _files_run(self._place):
                levels = self._model.score([image.convert("RGB") for image in some])
            scores += [float(level) for level in levels]
        return scores


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


deqa = Lazy("deqa", DeQA)
