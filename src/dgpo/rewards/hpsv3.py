"""HPSv3: how much people prefer a picture for a prompt, judged by a vision-language model.

Source: Ma et al., "HPSv3" (arXiv 2508.03789). Weights: ``MizzenAI/HPSv3`` on Qwen2-VL-7B (17 GB),
Apache-2.0; run by their own package ``hpsv3``. Unbounded, in practice 0 to 15; higher is better.
It needs a GPU of 24 GB. The package asks for versions of torch and transformers of its own: where
they clash with yours, serve it from another environment. Its model has not been run here.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dgpo.rewards.loading import Lazy, batches, device, loading, need

VARIABLE = "DGPO_HPSV3"
INSTALL = "pip install hpsv3"


class HPSv3:
    """The mean of the model's predicted preference.

    Args:
        checkpoint: a file ``HPSv3.safetensors``; default: what ``DGPO_HPSV3`` says, else what the
            package downloads.
        config: the package's configuration file, where it needs another.
        batch: pictures scored at once.

    Raises:
        UserError: the package is not installed, or cannot load the model.
    """

    __name__ = "hpsv3"

    def __init__(
        self, checkpoint: str | None = None, config: str | None = None, batch: int = 4
    ) -> None:
        need(self.__name__, "hpsv3", INSTALL)
        checkpoint = checkpoint or os.environ.get(VARIABLE)
        with loading(self.__name__, checkpoint or "MizzenAI/HPSv3", VARIABLE):
            package: Any = importlib.import_module("hpsv3")
            self._model: Any = package.HPSv3RewardInferencer(
                config_path=config, checkpoint_path=checkpoint, device=device()
            )
        self._batch = batch

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], **columns: Any
    ) -> list[float]:
        """One score for each picture."""
        scores: list[float] = []
        for some, texts in batches(self._batch, images, prompts):
            with tempfile.TemporaryDirectory() as folder:  # the package reads files
                files = [str(Path(folder) / f"{row}.png") for row in range(len(some))]
                for image, file in zip(some, files, strict=True):
                    image.convert("RGB").save(file)
                answers = self._model.reward(prompts=texts, image_paths=files)
            # each answer is (mean, spread) of the preference
            scores += [float(answer[0]) for answer in answers]
        return scores


hpsv3 = Lazy("hpsv3", HPSv3)
