"""Train the networks behind the out-of-domain measures, on renders alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from dgpo.pocket.measures import Measures, as_pixels
from dgpo.pocket.scenes import COLORS, SHAPES, Scene
from tools.pretrain.common import Stage, Training

CORRUPTIONS = ("blur", "noise", "colors")
HELD_OUT = 512
"""The number of pictures, from the first, that are evaluated and not trained on."""


def corrupt(pixels: Tensor, kind: str, strength: float, generator: torch.Generator) -> Tensor:
    """Make pictures [B, 3, H, W] in [-1, 1] worse.

    Args:
        pixels: the pictures.
        kind: ``blur`` (up to 2 px), ``noise`` (up to 0.6) or ``colors`` (shifts up to 0.8).
        strength: from 0 (unchanged) to 1.
        generator: the random numbers of the noise and the shifts.

    Raises:
        ValueError: there is no such kind.
    """
    if kind == "blur":
        blurred = ndimage.gaussian_filter(pixels.numpy(), (0, 0, 2 * strength, 2 * strength))
        return torch.from_numpy(blurred)
    if kind == "noise":
        noise = torch.randn(pixels.shape, generator=generator)
        return (pixels + 0.6 * strength * noise).clamp(-1, 1)
    if kind == "colors":
        sign = torch.randint(0, 2, (len(pixels), 3, 1, 1), generator=generator) * 2 - 1
        return (pixels + 0.8 * strength * sign).clamp(-1, 1)
    raise ValueError(f"corruption {kind!r} is not one of {', '.join(CORRUPTIONS)}")


def attribute_targets(scenes: list[Scene]) -> Tensor:
    """Count each (shape, colour), and each shape in each quarter of a scene: [N, 40]."""
    targets = torch.zeros(len(scenes), len(SHAPES) * len(COLORS) + len(SHAPES) * 4)
    colors = list(COLORS)
    for row, scene in zip(targets, scenes, strict=True):
        for shape in scene.shapes:
            kind = SHAPES.index(shape.shape)
            row[kind * len(colors) + colors.index(shape.color)] += 1
            quarter = int(shape.x > 0.5) + 2 * int(shape.y > 0.5)
            row[len(SHAPES) * len(colors) + kind * 4 + quarter] += 1
    return targets


def train_measures(
    folder: Path, images: np.ndarray, scenes: list[Scene], training: Training
) -> Measures:
    """Train the three networks side by side; returns them with averaged weights.

    The features learn to count shapes, colours and places (squared error). The matching model
    learns by the symmetric contrastive loss within the batch, where equal captions count as
    matches. The quality model learns ``1 - strength`` of a random corruption.

    Args:
        folder: the stage's folder.
        images: uint8 [N, H, W, 3]; the first 512 are held out.
        scenes: what they show, N of them.
        training: steps, batch, learning rate and seed.
    """
    torch.manual_seed(training.seed)
    measures = Measures()
    optimizer = torch.optim.AdamW(measures.parameters(), lr=training.lr, weight_decay=0.05)
    stage = Stage(folder, [measures], [optimizer], training.steps, training.seed)
    targets = attribute_targets(scenes)
    captions = [scene.caption for scene in scenes]
    held = slice(0, HELD_OUT)

    def evaluate() -> dict[str, float]:
        return _evaluated(measures, as_pixels(images[held]), targets[held], captions[held])

    for step in stage.run(evaluate, every=1000, hold=0.5):
        generator = stage.generator(step)
        rows = torch.randint(HELD_OUT, len(images), (training.batch,), generator=generator)
        pixels = as_pixels(images[rows.numpy()])
        losses = {
            "count": (measures.attributes(pixels)[1] - targets[rows]).square().mean() * 10,
            "judge": _judge_loss(measures, pixels, CORRUPTIONS[step % 3], generator),
            "contrast": _contrast_loss(measures, pixels, [captions[r] for r in rows.tolist()]),
        }
        stage.learn(torch.stack(list(losses.values())).sum())
        stage.note(**{name: value.item() for name, value in losses.items()})
    stage.finish()
    return measures.eval()


@torch.no_grad()
def _evaluated(
    measures: Measures, pixels: Tensor, targets: Tensor, captions: list[str]
) -> dict[str, float]:
    counts = measures.attributes(pixels)[1].round()
    pictures, texts = measures.embed_picture(pixels), measures.embed_text(captions)
    noisy = corrupt(pixels, "noise", 0.5, torch.Generator().manual_seed(1))
    best = (pictures @ texts.T).argmax(1).tolist()
    return {
        "attributes": (counts == targets).float().mean().item(),
        "retrieval": float(np.mean([captions[b] == captions[i] for i, b in enumerate(best)])),
        "match": (pictures * texts).sum(1).mean().item(),
        "quality_clean": measures.quality(pixels)[1].mean().item(),
        "quality_noise": measures.quality(noisy)[1].mean().item(),
    }


def _judge_loss(
    measures: Measures, pixels: Tensor, kind: str, generator: torch.Generator
) -> Tensor:
    """Score the quality model on a batch whose first half is made worse."""
    half = len(pixels) // 2
    strength = float(torch.rand((), generator=generator))
    worse = corrupt(pixels[:half], kind, strength, generator)
    wanted = torch.cat([torch.full((half,), 1 - strength), torch.ones(len(pixels) - half)])
    judged = measures.quality(torch.cat([worse, pixels[half:]]))[1][:, 0]
    return (judged - wanted).square().mean() * 5


def _contrast_loss(measures: Measures, pixels: Tensor, texts: list[str]) -> Tensor:
    same = torch.tensor([[a == b for b in texts] for a in texts]).float()
    logits = measures.embed_picture(pixels) @ measures.embed_text(texts).T
    logits = logits * measures.scale.exp()
    agree = same / same.sum(1, keepdim=True)
    cross_entropy = nn.functional.cross_entropy
    return cross_entropy(logits, agree) + cross_entropy(logits.T, agree)
