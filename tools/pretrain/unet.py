"""Teach the noise-prediction pocket: its UNet alone is new, and the flow-matching pocket shows how.

What is learned is the conditional mean of the noise. The flow-matching pocket knows it already, so
the UNet is told it (distillation, arXiv 1503.02531), wrong captions' share and guidance included,
instead of guessing it from one noise at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline, UNet2DConditionModel
from torch import Tensor, nn

from tools.pretrain.build_sd import noise_schedule
from tools.pretrain.captions import CaptionTable
from tools.pretrain.common import Stage, schedule
from tools.pretrain.transformer import LayoutHead

HEAVIEST = 25.0
"""Largest weight of a noise level."""


def level_weights(alphas_cumprod: Tensor) -> Tensor:
    """``min(1 / a, 25)`` of each level: what makes an error of the predicted noise count as one of
    the velocity ``sqrt(a) e - sqrt(1 - a) x0`` (arXiv 2202.00512).

    Unweighted, the noisy levels, where it is decided what is drawn and where, hardly count.
    """
    return (1 / alphas_cumprod).clamp(max=HEAVIEST)


def encode_last(encoders: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What Stable Diffusion 1.5 makes of token ids [B, 12]: the last hidden state [B, 12, 64]."""
    output = encoders[0](ids)
    return output.last_hidden_state, output.pooler_output


class Teacher:
    """The flow-matching pocket, asked for the noise in a variance-preserving sample.

    Args:
        pipe: the pocket.
        guidance: its classifier-free guidance, which the UNet learns as if it were its own answer.
    """

    def __init__(self, pipe: StableDiffusion3Pipeline, guidance: float):
        self.transformer, self.guidance = pipe.transformer, guidance
        config: Any = pipe.vae.config
        self.shift = config["shift_factor"] * config["scaling_factor"]
        encoders: Any = (pipe.text_encoder, pipe.text_encoder_2)
        tokenizer: Any = pipe.tokenizer
        self.embed = CaptionTable(tokenizer, encoders)

    @torch.no_grad()
    def noise(self, xt: Tensor, a: Tensor, captions: list[str]) -> Tensor:
        """The noise [B, 4, h, w] that the pocket sees in ``xt = sqrt(a) x0 + sqrt(1 - a) e``.

        Divided by ``sqrt(a) + sqrt(1 - a)``, ``xt`` lies on the straight path of flow matching at
        ``s = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a))``, where ``e = x_s + (1 - s) v``.

        Args:
            xt: [B, 4, h, w], of latents that are scaled but not shifted.
            a: [B], each sample's ``alphas_cumprod``.
            captions: B of them; an empty one asks for no caption.
        """
        scale = (a.sqrt() + (1 - a).sqrt()).view(-1, 1, 1, 1)
        sigma = (1 - a).sqrt() / scale.flatten()
        xs = (xt - a.sqrt().view(-1, 1, 1, 1) * self.shift) / scale
        hidden, pooled = self.embed([*captions, *[""] * len(captions)])
        velocity, without = self.transformer(
            hidden_states=xs.repeat(2, 1, 1, 1),
            timestep=sigma.repeat(2) * 1000,
            encoder_hidden_states=F.pad(hidden, (0, 0, 0, 1)),
            pooled_projections=pooled,
            return_dict=False,
        )[0].chunk(2)
        velocity = without + self.guidance * (velocity - without)
        return xs + (1 - sigma.view(-1, 1, 1, 1)) * velocity


@dataclass(frozen=True)
class Lessons:
    """Latents [N, 4, h, w] (scaled, not shifted), their true captions, and what each patch shows
    (int64 [N, tokens, attributes])."""

    latents: Tensor
    captions: list[str]
    layout: Tensor


@dataclass(frozen=True)
class LessonSettings:
    """Optimisation of the UNet."""

    steps: int = 1400
    batch: int = 64
    lr: float = 1.5e-3
    muon_lr: float = 0.02
    drop: float = 0.1
    layout: float = 0.5
    hold: float = 1.0
    report: int = 500


def make_optimizers(
    unet: UNet2DConditionModel, head: nn.Module, settings: LessonSettings
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the attention layers, AdamW for all else."""
    matrices, rest = [], [*head.parameters()]
    for name, parameter in unet.named_parameters():
        inner = "transformer_blocks" in name and parameter.ndim == 2
        (matrices if inner else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=settings.lr, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def image_tokens(maps: Tensor) -> Tensor:
    """[B, channels, h, w] to [B, h * w, channels]."""
    return maps.flatten(2).transpose(1, 2)


def train_unet(
    folder: Path,
    unet: UNet2DConditionModel,
    embed: CaptionTable,
    teacher: Teacher,
    data: Lessons,
    settings: LessonSettings,
    evaluate: Callable[[], dict[str, float]],
    seed: int = 0,
) -> None:
    """Minimise ``w (e' - e)^2`` with the teacher's noise ``e`` at ``x_t`` of drawn pictures, ``t``
    uniform, ``w`` of :func:`level_weights`, and a :class:`LayoutHead` on the middle block.

    Captions are dropped with probability ``drop``.  At the end the UNet holds the averaged weights.
    """
    torch.manual_seed(seed)
    middle: Any = unet.mid_block
    width = int(unet.config["block_out_channels"][-1])
    head = LayoutHead(middle, data.layout, width, image_tokens)
    optimizers = make_optimizers(unet, head, settings)
    stage = Stage(folder, [unet, head], optimizers, settings.steps, seed, save_every=100)
    parameters = [*unet.parameters(), *head.parameters()]
    alphas_cumprod = noise_schedule().alphas_cumprod
    weights = level_weights(alphas_cumprod)
    for step in stage.run(evaluate, every=settings.report):
        generator = stage.generator(step)
        for optimizer in optimizers:
            schedule(optimizer, step, settings.steps, settings.hold)
        rows = torch.randint(0, len(data.latents), (settings.batch,), generator=generator)
        dropped = torch.rand(settings.batch, generator=generator) < settings.drop
        pairs = zip(rows.tolist(), dropped.tolist(), strict=True)
        captions = ["" if gone else data.captions[row] for row, gone in pairs]
        t = torch.randint(0, len(alphas_cumprod), (settings.batch,), generator=generator)
        a = alphas_cumprod[t]
        x0 = data.latents[rows]
        noise = torch.randn(x0.shape, generator=generator)
        part = a.view(-1, 1, 1, 1)
        xt = part.sqrt() * x0 + (1 - part).sqrt() * noise
        wanted = teacher.noise(xt, a, captions)
        predicted = unet(xt, t, embed(captions)[0], return_dict=False)[0]
        loss = (weights[t] * (predicted - wanted).square().mean((1, 2, 3))).mean()
        layout_loss = head(data.layout[rows])
        stage.note(loss=loss.item(), layout=layout_loss.item())
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss + settings.layout * layout_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
    head.hook.remove()
    with torch.no_grad():
        for value, parameter in zip(stage.average.values, parameters, strict=True):
            parameter.copy_(value)
