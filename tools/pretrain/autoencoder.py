"""Train the autoencoder until the verifier reads its reconstructions as well as the originals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tools.pretrain.build import build_vae
from tools.pretrain.common import Stage, Training


def to_tensor(images: np.ndarray) -> Tensor:
    """Turn uint8 [N, H, W, 3] into float [N, 3, H, W] in [-1, 1], channels last."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


def to_images(pixels: Tensor) -> np.ndarray:
    """Turn float [N, 3, H, W] in [-1, 1] into uint8 [N, H, W, 3]."""
    scaled = ((pixels.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).to(torch.uint8).numpy()


@torch.no_grad()
def encode(vae: Any, images: np.ndarray, batch: int = 256) -> Tensor:
    """Return the raw latents (the posterior's mode) of pictures, [N, 4, H / 4, W / 4]."""
    parts = (to_tensor(images[i : i + batch]) for i in range(0, len(images), batch))
    return torch.cat([vae.encode(part).latent_dist.mode().contiguous() for part in parts])


@torch.no_grad()
def reconstruct(vae: Any, images: np.ndarray) -> np.ndarray:
    """Send pictures through the autoencoder and back."""
    return to_images(vae.decode(encode(vae, images)).sample)


def train_vae(
    folder: Path,
    images: np.ndarray,
    score: Callable[[np.ndarray], float],
    training: Training,
) -> AutoencoderKL:
    """Train on pictures, with noise on the latents so that the decoder forgives small errors.

    The loss is ``|y - x| + 2 (y - x)^2 + 0.001 z^2``; the noise has a tenth of the latents' scale.
    The latents' mean and deviation become the configuration's shift and scaling factors.

    Args:
        folder: the stage's folder.
        images: uint8 [N, H, W, 3]; the first 600 are held out.
        score: returns the share of the first 600 pictures, or of their reconstructions, that is
            right.
        training: steps, batch, learning rate and seed.
    """
    torch.manual_seed(training.seed)
    vae: Any = build_vae()
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=training.lr, weight_decay=0.0, betas=(0.9, 0.99)
    )
    stage = Stage(folder, [vae], [optimizer], training.steps, training.seed)

    def evaluate() -> dict[str, float]:
        return {"strict": score(reconstruct(vae, images[:600]))}

    for step in stage.run(evaluate, every=500, hold=0.4):
        generator = stage.generator(step)
        rows = torch.randint(600, len(images), (training.batch,), generator=generator)
        pixels = to_tensor(images[rows.numpy()])
        latents = vae.encode(pixels).latent_dist.mode()
        noise = torch.randn(latents.shape, generator=generator)
        decoded = vae.decode(latents + 0.1 * noise).sample
        error = decoded - pixels
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-3 * latents.square().mean()
        stage.learn(loss)
        stage.note(loss=loss.item())
    stage.finish()
    latents = encode(vae, images[:2000])
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4),
        shift_factor=round(latents.mean().item(), 4),
    )
    return vae.eval()
