"""Train the networks behind the out-of-domain measures, on renders alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from dgpo.pocket.measures import Measures, as_pixels
from dgpo.pocket.scenes import COLORS, SHAPES, Scene
from tools.pretrain.common import Stage, schedule


def corrupt(pixels: Tensor, kind: str, strength: float, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1], made worse.

    Args:
        kind: ``blur`` (up to 2 px), ``noise`` (up to 0.6) or ``colors`` (shifts up to 0.8).
        strength: 0 (unchanged) to 1.
        generator: random numbers of the noise and the shifts.
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
    raise ValueError(f"corruption {kind!r} is not one of blur, noise, colors")


def attribute_targets(scenes: list[Scene]) -> Tensor:
    """[N, 40]: how many of each (shape, colour), and of each shape in each quarter."""
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
    folder: Path,
    images: np.ndarray,
    scenes: list[Scene],
    steps: int = 4000,
    batch: int = 96,
    lr: float = 2e-3,
    seed: int = 0,
) -> Measures:
    """Train the three networks side by side; returns them with averaged weights.

    The features learn to count shapes, colours and places (squared error), the matching model
    learns by the symmetric contrastive loss within the batch (equal captions count as matches),
    the quality model learns ``1 - strength`` of a random corruption.
    """
    torch.manual_seed(seed)
    measures = Measures()
    optimizer = torch.optim.AdamW(measures.parameters(), lr=lr, weight_decay=0.05)
    stage = Stage(folder, [measures], [optimizer], steps, seed)
    targets = attribute_targets(scenes)
    captions = [scene.caption for scene in scenes]
    held = slice(0, 512)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        pixels = as_pixels(images[held])
        counts = measures.attributes(pixels)[1].round()
        pictures, texts = measures.embed_picture(pixels), measures.embed_text(captions[held])
        generator = torch.Generator().manual_seed(1)
        noisy = corrupt(pixels, "noise", 0.5, generator)
        best = (pictures @ texts.T).argmax(1).tolist()
        return {
            "attributes": (counts == targets[held]).float().mean().item(),
            "retrieval": float(np.mean([captions[b] == captions[i] for i, b in enumerate(best)])),
            "match": (pictures * texts).sum(1).mean().item(),
            "quality_clean": measures.quality(pixels)[1].mean().item(),
            "quality_noise": measures.quality(noisy)[1].mean().item(),
        }

    for step in stage.run(evaluate, every=1000):
        generator = stage.generator(step)
        schedule(optimizer, step, steps)
        rows = torch.randint(512, len(images), (batch,), generator=generator)
        pixels = as_pixels(images[rows.numpy()])
        kind = ("blur", "noise", "colors")[step % 3]
        strength = float(torch.rand((), generator=generator))
        worse = corrupt(pixels[: batch // 2], kind, strength, generator)
        wanted = torch.cat([torch.full((batch // 2,), 1 - strength), torch.ones(batch // 2)])
        judged = measures.quality(torch.cat([worse, pixels[batch // 2 :]]))[1][:, 0]
        counted = measures.attributes(pixels)[1]
        texts = [captions[r] for r in rows.tolist()]
        same = torch.tensor([[a == b for b in texts] for a in texts]).float()
        logits = measures.embed_picture(pixels) @ measures.embed_text(texts).T
        logits = logits * measures.scale.exp()
        agree = same / same.sum(1, keepdim=True)
        losses = {
            "count": (counted - targets[rows]).square().mean() * 10,
            "judge": (judged - wanted).square().mean() * 5,
            "contrast": (
                nn.functional.cross_entropy(logits, agree)
                + nn.functional.cross_entropy(logits.T, agree)
            ),
        }
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(measures.parameters(), 1.0)
        optimizer.step()
        stage.note(**{name: value.item() for name, value in losses.items()})
    with torch.no_grad():
        for value, parameter in zip(stage.average.values, measures.parameters(), strict=True):
            parameter.copy_(value)
    return measures.eval()
