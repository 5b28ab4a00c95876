"""Out-of-domain measures are never optimised by training, so they show reward hacking.

They are three small networks, which the pretraining command trains on renders alone:

* features for KID, the kernel distance between samples and fresh renders (lower is better);
* an image-text matching model in the manner of CLIP: the cosine of picture and caption;
* a no-reference quality: how free from blur, noise and colour shifts; 1 is a clean render.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from dgpo.pictures import rgb
from dgpo.pocket.scenes import draw_scene, parse_caption, render
from dgpo.pocket.text import TOKENS, build_text_encoder, build_tokenizer

FEATURES = 64
"""The width of the features."""
_FILE = Path(__file__).parent / "weights" / "measures" / "measures.safetensors"


class PictureNet(nn.Module):
    """A ``PictureNet`` is a small convolutional network with two outputs.

    It turns pictures [B, 3, 32, 32] in [-1, 1] into features [B, 64] and ``outputs`` numbers each.
    """

    def __init__(self, outputs: int):
        super().__init__()

        def block(inputs: int, channels: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, channels, 3, stride, 1), nn.GroupNorm(4, channels), nn.SiLU()
            )

        self.body = nn.Sequential(block(3, 16, 2), block(16, 32, 2), block(32, 64, 1))
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64 * 64, FEATURES), nn.SiLU())
        self.head = nn.Linear(FEATURES, outputs)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features [B, 64] and the outputs [B, outputs]."""
        features = self.features(self.body(pixels))
        return features, self.head(features)


class Measures(nn.Module):
    """``Measures`` are the three networks; their weights are one file of the package."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.attributes = PictureNet(24 + 16)
        self.quality = PictureNet(1)
        self.picture = PictureNet(FEATURES)
        self.text: CLIPTextModelWithProjection = build_text_encoder(self.tokenizer)
        self.scale = nn.Parameter(torch.tensor(2.5))

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Return unit vectors [N, 64] for captions."""
        ids = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return nn.functional.normalize(self.text(ids).text_embeds, dim=-1)

    def embed_picture(self, pixels: Tensor) -> Tensor:
        """Return unit vectors [N, 64] for pictures [N, 3, 32, 32]."""
        return nn.functional.normalize(self.picture(pixels)[1], dim=-1)


@functools.cache
def load_measures() -> Measures:
    """Return the trained networks of the package."""
    # building draws initial weights, which must not move the caller's random state
    with torch.random.fork_rng(devices=[]):
        measures = Measures()
    measures.load_state_dict(load_file(_FILE))
    return measures.eval().requires_grad_(False)


def as_pixels(images: Sequence[Image.Image] | np.ndarray) -> Tensor:
    """Return pictures (PIL, or uint8 [N, 32, 32, 3]) as [N, 3, 32, 32] in [-1, 1]."""
    if not isinstance(images, np.ndarray):
        images = np.stack([np.asarray(rgb(image)) for image in images])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def features(images: Sequence[Image.Image] | np.ndarray) -> Tensor:
    """Return the features [N, 64] on which KID is computed."""
    return load_measures().attributes(as_pixels(images))[0]


@torch.no_grad()
def match(images: Sequence[Image.Image], prompts: Sequence[str], **_: object) -> list[float]:
    """Return the cosine of picture and caption, in [-1, 1]; higher is better."""
    measures = load_measures()
    pictures = measures.embed_picture(as_pixels(images))
    return (pictures * measures.embed_text(prompts)).sum(-1).tolist()


@torch.no_grad()
def quality(images: Sequence[Image.Image], prompts: Sequence[str], **_: object) -> list[float]:
    """Return the no-reference quality: 1 for a clean render, about 0 for a badly corrupted one."""
    return load_measures().quality(as_pixels(images))[1][:, 0].tolist()


def kid(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the unbiased squared kernel distance of two sets of features, and its standard error.

    ``MMD^2 = mean k(a, a') + mean k(b, b') - 2 mean k(a, b)`` with ``k(x, y) = (x.y / d + 1)^3``;
    the first-order (influence) terms of the statistic give the error.

    Source: Binkowski et al., "Demystifying MMD GANs" (arXiv 1801.01401), section 4.
    Differs from the paper: one estimate over all samples instead of a mean over subsets.

    Args:
        a, b: features [N, d] and [M, d], N and M at least 2.
    """
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum(1) - k.diagonal()) / (len(x) - 1)

    across = kernel(a, b)
    own_a, own_b = within(a), within(b)
    distance = own_a.mean() + own_b.mean() - 2 * across.mean()
    influence = (own_a - across.mean(1), own_b - across.mean(0))
    variance = sum(4 * part.var() / len(part) for part in influence)
    return float(distance), math.sqrt(float(variance))


class PocketKID:
    """``PocketKID`` compares samples with fresh renders of the same captions; 0 is best."""

    of_set = True
    __name__ = "pocket_kid"

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], **_: object
    ) -> tuple[float, float, float]:
        """Return the distance and its 95% confidence interval."""
        rng = np.random.default_rng(2_008_425)
        fresh = render([draw_scene(parse_caption(prompt), rng) for prompt in prompts])
        value, error = kid(features(images), features(fresh))
        return value, value - 1.96 * error, value + 1.96 * error


pocket_kid = PocketKID()
