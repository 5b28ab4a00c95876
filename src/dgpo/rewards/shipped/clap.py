"""CLAP score: how close a sound is to its prompt, ``cos(audio, text)``.

Source: Wu et al., "Large-Scale Contrastive Language-Audio Pretraining" (arXiv 2211.06687). Weights:
``laion/clap-htsat-unfused`` (0.6 GB), Apache-2.0. Range [-1, 1], in practice 0 to 0.6; higher is
better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.signal import resample_poly

from dgpo.errors import UserError
from dgpo.rewards.loading import device, loading
from dgpo.rewards.reward import Reward
from dgpo.rewards.wrappers import Lazy

WEIGHTS = "laion/clap-htsat-unfused"
VARIABLE = "DGPO_CLAP"


class ClapScore(Reward):
    """The cosine of sound and text, averaged over stretches of the model's length (10 s).

    Args:
        weights: hub id or folder of a CLAP model; default: what ``DGPO_CLAP`` says, else LAION's.
        rate: samples a second of the sounds that are scored (44,100 for Stable Audio Open, 16,000
            for AudioLDM 2), unless a row's column ``sampling_rate`` says otherwise.

    Raises:
        UserError: the model cannot be loaded.
    """

    name = "clap"
    media = "sounds"

    def __init__(self, weights: str | None = None, rate: int = 44_100) -> None:
        from transformers import AutoFeatureExtractor, AutoTokenizer, ClapModel

        with loading(self.name, weights, VARIABLE, WEIGHTS) as place:
            model: Any = ClapModel.from_pretrained(place)
            self._features: Any = AutoFeatureExtractor.from_pretrained(place)
            self._tokens: Any = AutoTokenizer.from_pretrained(place)
        self._model = model.eval().requires_grad_(False)
        self._rate = rate

    @torch.no_grad()
    def __call__(
        self,
        images: Sequence[Any],
        prompts: Sequence[str],
        sampling_rate: Sequence[int | None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """One score for each sound.

        Args:
            images: the sounds, float arrays or tensors [samples] or [channels, samples] in -1..1.
            prompts: what each should sound like.
            sampling_rate: samples a second of each row; None: the constructor's.

        Raises:
            UserError: a row holds no sound.
        """
        self._model.to(device())
        rates = sampling_rate or [None] * len(prompts)
        rows = enumerate(zip(images, prompts, rates, strict=True))
        return [self._score(row, *parts) for row, parts in rows]

    def _score(self, row: int, sound: Any, prompt: str, rate: int | None) -> float:
        wave = _mono(sound, row, rate or self._rate, self._features.sampling_rate)
        length = self._features.nb_max_samples
        # the library would take one stretch at random: a reward must not change from call to call
        parts = [wave[start : start + length] for start in range(0, len(wave), length)]
        if len(parts) > 1 and len(parts[-1]) < length // 2:
            parts.pop()
        where = self._model.device
        features = self._features(
            parts, sampling_rate=self._features.sampling_rate, return_tensors="pt"
        ).to(where)
        tokens = self._tokens(prompt, truncation=True, max_length=77, return_tensors="pt").to(where)
        outputs = self._model(**features, **tokens)
        cosines = torch.nn.functional.cosine_similarity(
            outputs.audio_embeds.float(), outputs.text_embeds.float()
        )
        return float(cosines.mean())


def _mono(sound: Any, row: int, rate: int, wanted: int) -> np.ndarray:
    """The mean of the channels at the model's rate, float32 [samples]."""
    wave = np.asarray(sound.cpu() if isinstance(sound, torch.Tensor) else sound)
    if wave.ndim == 2:
        wave = wave.mean(0)
    if wave.ndim != 1 or not wave.size or wave.dtype.kind != "f":
        raise UserError(
            f"reward 'clap', row {row}: {type(sound).__name__} {list(wave.shape)} of {wave.dtype} "
            "is not a sound: a float array [samples] or [channels, samples]"
        )
    shared = math.gcd(rate, wanted)
    return resample_poly(wave, wanted // shared, rate // shared).astype(np.float32)


clap = Lazy(ClapScore)
