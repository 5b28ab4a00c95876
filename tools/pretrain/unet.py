"""Teach the noise-prediction pocket: only its UNet is new, and the flow-matching pocket teaches it.

The UNet learns the conditional mean of the noise. The flow-matching pocket knows it already,
including its guidance and the share of wrong captions. So the UNet is told the mean (distillation,
arXiv 1503.02531) instead of guessing it from one noise at a time.
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
from tools.pretrain.common import Stage
from tools.pretrain.transformer import LayoutHead

HEAVIEST = 25.0
"""The largest weight of a noise level."""


def level_weights(alphas_cumprod: Tensor) -> Tensor:
    """Return the weight ``min(1 / a, 25)`` of each noise level.

    With it an error of the predicted noise counts as an error of the velocity
    ``sqrt(a) e - sqrt(1 - a) x0`` (arXiv 2202.00512). Without it the noisy levels, which decide
    what is drawn and where, hardly count.
    """
    return (1 / alphas_cumprod).clamp(max=HEAVIEST)


def encode_last(encoders: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Encode token ids [B, 12] as Stable Diffusion 1.5 does: the last hidden state [B, 12, 64]."""
    output = encoders[0](ids)
    return output.last_hidden_state, output.pooler_output


class Teacher:
    """The flow-matching pocket, which tells the noise in a variance-preserving sample.

    Args:
        pipe: the pocket.
        guidance: the scale of its classifier-free guidance; the UNet learns the guided answer.
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
        """Return the noise [B, 4, h, w] that the pocket sees in ``sqrt(a) x0 + sqrt(1 - a) e``.

        Divided by ``sqrt(a) + sqrt(1 - a)``, ``xt`` lies on the straight path of flow matching at
        ``s = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a))``, where ``e = x_s + (1 - s) v``.

        Args:
            xt: [B, 4, h, w], noised latents that are scaled but not shifted.
            a: [B], the ``alphas_cumprod`` of each sample.
            captions: B captions; an empty one stands for no caption.
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
    """What the UNet trains on.

    Args:
        latents: [N, 4, h, w], scaled but not shifted.
        captions: the N true captions.
        layout: int64 [N, tokens, attributes], what each patch shows.
    """

    latents: Tensor
    captions: list[str]
    layout: Tensor


@dataclass(frozen=True)
class LessonSettings:
    """How the UNet trains; the settings are those of
    :class:`~tools.pretrain.transformer.FlowSettings`."""

    steps: int = 1400
    batch: int = 64
    lr: float = 1.5e-3
    muon_lr: float = 0.02
    drop: float = 0.1
    layout: float = 0.5
    hold: float = 1.0
    report: int = 500
    seed: int = 0


def make_optimizers(
    unet: UNet2DConditionModel, head: nn.Module, settings: LessonSettings
) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices of the attention layers, and AdamW for the rest."""
    matrices, rest = [], [*head.parameters()]
    for name, parameter in unet.named_parameters():
        inner = "transformer_blocks" in name and parameter.ndim == 2
        (matrices if inner else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=settings.lr, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def image_tokens(maps: Tensor) -> Tensor:
    """Turn maps [B, channels, h, w] into tokens [B, h * w, channels]."""
    return maps.flatten(2).transpose(1, 2)


def train_unet(
    folder: Path,
    unet: UNet2DConditionModel,
    embed: CaptionTable,
    teacher: Teacher,
    data: Lessons,
    settings: LessonSettings,
    evaluate: Callable[[], dict[str, float]],
) -> None:
    """Minimise ``w (e' - e)^2`` against the teacher's noise ``e`` at ``x_t`` of drawn pictures.

    ``t`` is uniform, and ``w`` is that level's entry of :func:`level_weights`. The loss of a
    :class:`LayoutHead` on the middle block is added, and captions are dropped with probability
    ``drop``. At the end the UNet holds the averaged weights.
    """
    torch.manual_seed(settings.seed)
    middle: Any = unet.mid_block
    width = int(unet.config["block_out_channels"][-1])
    head = LayoutHead(middle, data.layout, width, image_tokens)
    optimizers = make_optimizers(unet, head, settings)
    stage = Stage(folder, [unet, head], optimizers, settings.steps, settings.seed, save_every=100)
    alphas_cumprod = noise_schedule().alphas_cumprod
    weights = level_weights(alphas_cumprod)
    for step in stage.run(evaluate, settings.report, settings.hold):
        generator = stage.generator(step)
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
        stage.learn(loss + settings.layout * layout_loss)
    head.hook.remove()
    stage.finish()
