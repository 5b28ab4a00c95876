"""Train the transformer, together with the text encoders, by flow matching."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dgpo.pocket.pretrain.captions import encode_text, tokenize
from dgpo.pocket.pretrain.common import Stage, schedule


class TailAttention:
    """Joint attention in which the last text token stands for many equal ones.

    The stock pipeline appends up to 256 zero vectors to the text.  Equal tokens stay equal through
    every layer, and ``n`` equal keys act on a query as one key whose logit is larger by ``log n``;
    so one token with that bias trains the transformer for every length, at the cost of one token.
    """

    bias: Tensor | None = None
    """[B], ``log n`` of each sample."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        batch, image_tokens = hidden_states.shape[:2]

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, x.shape[1], attn.heads, -1).transpose(1, 2)

        image = [heads(p(hidden_states)) for p in (attn.to_q, attn.to_k, attn.to_v)]
        text = [
            heads(p(encoder_hidden_states))
            for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        ]
        query = torch.cat([attn.norm_q(image[0]), attn.norm_added_q(text[0])], 2)
        key = torch.cat([attn.norm_k(image[1]), attn.norm_added_k(text[1])], 2)
        value = torch.cat([image[2], text[2]], 2)
        assert self.bias is not None
        mask = query.new_zeros(batch, 1, 1, key.shape[2])
        mask[:, 0, 0, -1] = self.bias
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = mixed.transpose(1, 2).flatten(2)
        image_out, text_out = mixed[:, :image_tokens], mixed[:, image_tokens:]
        if not attn.context_pre_only:
            text_out = attn.to_add_out(text_out)
        return attn.to_out[1](attn.to_out[0](image_out)), text_out


def random_tails(batch: int, generator: torch.Generator) -> Tensor:
    """``log n`` for tail lengths n: 1 for half of the samples, else up to 512, log-uniform."""
    longest = torch.rand(batch, generator=generator) * math.log(512)
    return torch.where(torch.rand(batch, generator=generator) < 0.5, 0.0, longest)


@dataclass(frozen=True)
class FlowData:
    """Latents [N, 4, h, w] in the denoiser's space and a function that gives rows their captions.

    ``captions(rows, generator)`` returns one caption for each row; wrong ones where noise says so.
    """

    latents: Tensor
    captions: Callable[[list[int], torch.Generator], list[str]]


@dataclass(frozen=True)
class FlowSettings:
    """Optimisation of a transformer stage."""

    steps: int
    batch: int = 128
    lr: float = 1.5e-3
    muon_lr: float | None = 0.02
    text_lr: float = 3e-4
    drop: float = 0.1
    hold: float = 0.5
    report: int = 1000


def make_optimizers(
    transformer: SD3Transformer2DModel,
    encoders: tuple[CLIPTextModelWithProjection, ...],
    settings: FlowSettings,
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (if ``muon_lr``), AdamW for everything else."""
    text = [p for encoder in encoders for p in encoder.parameters()]
    matrices, rest = [], []
    for name, parameter in transformer.named_parameters():
        inner = name.startswith("transformer_blocks") and parameter.ndim == 2
        (matrices if inner and settings.muon_lr else rest).append(parameter)
    adam = torch.optim.AdamW(
        [{"params": rest, "lr": settings.lr}, {"params": text, "lr": settings.text_lr}],
        weight_decay=0.01,
        betas=(0.9, 0.98),
    )
    if not settings.muon_lr:
        return [adam]
    return [torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=0.01), adam]


def train_flow(
    folder: Path,
    transformer: SD3Transformer2DModel,
    encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
    data: FlowData,
    settings: FlowSettings,
    evaluate: Callable[[], dict[str, float]],
    seed: int = 0,
) -> None:
    """Minimise ``mean (v - (noise - x0))^2`` at ``x_s = (1 - s) x0 + s noise``.

    Half of the noise levels are uniform, half logit-normal; captions are dropped with probability
    ``drop``.  At the end the modules hold the averaged weights.
    """
    torch.manual_seed(seed)
    modules = [transformer, *encoders]
    optimizers = make_optimizers(transformer, encoders, settings)
    stage = Stage(folder, modules, optimizers, settings.steps, seed)
    attention: Any = TailAttention()
    stock = transformer.attn_processors
    parameters = [p for m in modules for p in m.parameters()]

    def stock_evaluate() -> dict[str, float]:
        transformer.set_attn_processor(dict(stock))
        figures = evaluate()
        transformer.set_attn_processor(attention)
        return figures

    transformer.set_attn_processor(attention)
    for step in stage.run(stock_evaluate, every=settings.report):
        generator = stage.generator(step)
        for optimizer in optimizers:
            schedule(optimizer, step, settings.steps, settings.hold)
        rows = torch.randint(0, len(data.latents), (settings.batch,), generator=generator)
        captions = data.captions(rows.tolist(), generator)
        dropped = torch.rand(settings.batch, generator=generator) < settings.drop
        captions = ["" if d else c for d, c in zip(dropped.tolist(), captions, strict=True)]
        x0 = data.latents[rows]
        noise = torch.randn(x0.shape, generator=generator)
        uniform = torch.rand(settings.batch, generator=generator)
        normal = torch.randn(settings.batch, generator=generator) * 1.2 + 0.4
        sigma = uniform if step % 2 else normal.sigmoid()
        s = sigma.view(-1, 1, 1, 1)
        hidden, pooled = encode_text(encoders, tokenize(tokenizer, captions))
        attention.bias = random_tails(settings.batch, generator)
        predicted = transformer(
            hidden_states=(1 - s) * x0 + s * noise,
            timestep=sigma * 1000,
            encoder_hidden_states=F.pad(hidden, (0, 0, 0, 1)),
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        loss = (predicted - (noise - x0)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        stage.note(loss=loss.item())
    transformer.set_attn_processor(dict(stock))
    with torch.no_grad():
        for value, parameter in zip(stage.average.values, parameters, strict=True):
            parameter.copy_(value)
