"""Aesthetic score: how beautiful people would find a picture; the prompt is not looked at.

A linear head on CLIP ViT-L/14, trained by LAION on rated pictures (SAC, logos, AVA). Licence:
Apache-2.0 (head, 4 MB), MIT (CLIP). Range about 1 to 10, in practice 4 to 7; higher is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dgpo.errors import UserError
from dgpo.rewards.loading import loading, read_weights
from dgpo.rewards.reward import Media, Texts
from dgpo.rewards.shipped import clip
from dgpo.rewards.wrappers import Lazy

HEAD = "trl-lib/ddpo-aesthetic-predictor"
FILE = "aesthetic-model.pth"
VARIABLE = "DGPO_AESTHETIC"
WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)
"""The places of the linear layers in the published head; dropouts stand between the first four."""


def linear_head(weights: Mapping[str, Tensor]) -> nn.Sequential:
    """Build the head D -> 1024 -> 128 -> 64 -> 16 -> 1 from the published weights.

    There is no activation between the layers: the head as a whole is one affine map.

    Args:
        weights: ``0.weight``, ``0.bias``, ... with or without the prefix ``layers.``.

    Raises:
        ValueError: the weights are those of other layers.
    """
    state = {key.removeprefix("layers."): value for key, value in weights.items()}
    if "0.weight" not in state or state["0.weight"].dim() != 2:
        raise ValueError(f"no weights of a linear head but {', '.join(sorted(state))[:120]}")
    inputs = (state["0.weight"].shape[1], *WIDTHS[:-1])
    layers: list[nn.Module] = [nn.Identity() for _ in range(max(PLACES) + 1)]
    for place, width, out in zip(PLACES, inputs, WIDTHS, strict=True):
        layers[place] = nn.Linear(width, out)
    head = nn.Sequential(*layers)
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"not the published head: {error}") from error
    return head.float().eval().requires_grad_(False)


class Aesthetic(clip.ClipReward):
    """The head applied to the unit vector of each picture.

    Args:
        head: ``.pth`` (tensors only) or ``.safetensors`` file, a folder or hub repository with
            ``aesthetic-model.pth``; default: what ``DGPO_AESTHETIC`` says, else the published one.
        clip_weights: hub id or folder; default: what ``DGPO_CLIP`` says, else ViT-L/14.
        batch: how many pictures are scored at once.

    Raises:
        UserError: they cannot be loaded or do not fit each other.
    """

    name = "aesthetic"

    def __init__(
        self, head: str | None = None, clip_weights: str | None = None, batch: int = 32
    ) -> None:
        with loading(self.name, head, VARIABLE, HEAD) as place:
            self._head = linear_head(read_weights(place, FILE))
        super().__init__(clip.shared_encoder(clip_weights, batch))
        wide = self._head.get_submodule("0").in_features
        if wide != self._encoder.width:
            raise UserError(
                f"reward 'aesthetic': the head {place!r} takes vectors of {wide} numbers, the CLIP "
                f"model makes {self._encoder.width}; the published head needs {clip.WEIGHTS}"
            )

    @torch.no_grad()
    def __call__(self, images: Media, prompts: Texts, **columns: Any) -> list[float]:
        """One score for each picture."""
        return self._head(self._encoder.images(images)).squeeze(-1).tolist()


aesthetic = Lazy(Aesthetic)
