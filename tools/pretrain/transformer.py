"""Train the transformer by flow matching, on captions that frozen text encoders read."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from tools.pretrain.captions import CaptionTable
from tools.pretrain.common import Stage


class TailAttention:
    """Joint attention in which the last text token stands for many equal ones.

    The stock pipeline appends up to 256 zero vectors to the text. Equal tokens stay equal through
    every layer, and ``n`` equal keys act on a query as one key whose logit is larger by ``log n``.
    So one token with that bias trains the transformer for every length, at the cost of one token.
    """

    bias: Tensor | None = None
    """``log n`` of each sample, [B]."""

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
    """Draw ``log n`` for tail lengths n: 1 for half of the samples, else log-uniform up to 512."""
    longest = torch.rand(batch, generator=generator) * math.log(512)
    return torch.where(torch.rand(batch, generator=generator) < 0.5, 0.0, longest)


@dataclass(frozen=True)
class FlowData:
    """What the transformer trains on.

    Args:
        latents: [N, 4, h, w], in the denoiser's space.
        captions: ``captions(rows, generator)`` returns a caption for each row, some of them wrong.
        layout: int64 [N, image tokens, attributes], what each patch shows; None: it is not taught.
        weights: [N], how often each row is drawn, relative to the others; None: all equally.
    """

    latents: Tensor
    captions: Callable[[list[int], torch.Generator], list[str]]
    layout: Tensor | None = None
    weights: Tensor | None = None

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the rows of a batch with replacement, int64 [count]."""
        if self.weights is None:
            return torch.randint(0, len(self.latents), (count,), generator=generator)
        return torch.multinomial(self.weights, count, replacement=True, generator=generator)


class LayoutHead(nn.Module):
    """A head that reads from the middle of the transformer what each patch is to show.

    It shapes the hidden states while the transformer learns and is thrown away afterwards:
    denoising alone teaches a small network late which words belong together and where things go.

    Args:
        block: the block whose image tokens are read.
        layout: what patches show, which tells the number of classes of each attribute.
        width: the width of an image token.
        tokens: takes the image tokens [B, tokens, width] out of what the block returns.
    """

    def __init__(
        self,
        block: nn.Module,
        layout: Tensor,
        width: int = 128,
        tokens: Callable[[Any], Tensor] = operator.itemgetter(1),
    ):
        super().__init__()
        self.tokens = tokens
        self.sizes = [int(highest) + 1 for highest in layout.flatten(0, 1).amax(0)]
        self.read = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, sum(self.sizes))
        )
        self.states: Tensor | None = None
        self.hook = block.register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, outputs: Any) -> None:
        self.states = self.tokens(outputs) if torch.is_grad_enabled() else None

    def forward(self, layout: Tensor) -> Tensor:
        """Return the cross-entropy of the last pass and what patches show, int64 [B, tokens, A]."""
        assert self.states is not None
        logits = self.read(self.states).flatten(0, 1).split(self.sizes, 1)
        targets = layout.flatten(0, 1).unbind(1)
        return sum(map(F.cross_entropy, logits, targets), self.states.new_zeros(()))


@dataclass(frozen=True)
class FlowSettings:
    """How a transformer stage trains.

    Args:
        steps: the number of optimiser steps.
        batch: the number of pictures in a step.
        lr: the learning rate of AdamW.
        muon_lr: the learning rate of Muon; None trains everything by AdamW.
        drop: the share of captions that are dropped.
        layout: the weight of the layout head's loss; 0 for no head.
        hold: the share of the steps before the learning rate decays.
        report: the number of steps between evaluations.
        seed: the seed of weights, batches and noise.
    """

    steps: int
    batch: int = 128
    lr: float = 1.5e-3
    muon_lr: float | None = 0.02
    drop: float = 0.1
    layout: float = 0.5
    hold: float = 0.5
    report: int = 1000
    seed: int = 0


def make_optimizers(
    transformer: SD3Transformer2DModel,
    head: nn.Module | None,
    settings: FlowSettings,
) -> list[torch.optim.Optimizer]:
    """Make Muon for the blocks' matrices, if it has a learning rate, and AdamW for the rest."""
    matrices, rest = [], [*head.parameters()] if head else []
    for name, parameter in transformer.named_parameters():
        inner = name.startswith("transformer_blocks") and parameter.ndim == 2
        (matrices if inner and settings.muon_lr else rest).append(parameter)
    adam = torch.optim.AdamW(rest, lr=settings.lr, weight_decay=0.01, betas=(0.9, 0.98))
    if not settings.muon_lr:
        return [adam]
    return [torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=0.01), adam]


def train_flow(
    folder: Path,
    transformer: SD3Transformer2DModel,
    embed: CaptionTable,
    data: FlowData,
    settings: FlowSettings,
    evaluate: Callable[[], dict[str, float]],
) -> None:
    """Minimise ``mean (v - (noise - x0))^2`` at ``x_s = (1 - s) x0 + s noise``.

    Half of the noise levels are uniform, half logit-normal; captions are dropped with probability
    ``drop``. Where the data says what patches show, ``settings.layout`` times the loss of a
    :class:`LayoutHead` is added. At the end the transformer holds the averaged weights.
    """
    torch.manual_seed(settings.seed)
    layout = data.layout if settings.layout else None
    middle = transformer.transformer_blocks[len(transformer.transformer_blocks) // 2 - 1]
    head = LayoutHead(middle, layout) if layout is not None else None
    modules = [transformer, *([head] if head else [])]
    optimizers = make_optimizers(transformer, head, settings)
    stage = Stage(folder, modules, optimizers, settings.steps, settings.seed)
    attention: Any = TailAttention()
    stock = transformer.attn_processors

    def stock_evaluate() -> dict[str, float]:
        transformer.set_attn_processor(dict(stock))
        figures = evaluate()
        transformer.set_attn_processor(attention)
        return figures

    transformer.set_attn_processor(attention)
    for step in stage.run(stock_evaluate, settings.report, settings.hold):
        generator = stage.generator(step)
        rows, captions = _batch(data, settings, generator)
        x0 = data.latents[rows]
        noise = torch.randn(x0.shape, generator=generator)
        sigma = _noise_levels(settings.batch, generator, uniform=bool(step % 2))
        s = sigma.view(-1, 1, 1, 1)
        hidden, pooled = embed(captions)
        attention.bias = random_tails(settings.batch, generator)
        predicted = transformer(
            hidden_states=(1 - s) * x0 + s * noise,
            timestep=sigma * 1000,
            encoder_hidden_states=F.pad(hidden, (0, 0, 0, 1)),
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        loss = (predicted - (noise - x0)).square().mean()
        stage.note(loss=loss.item())
        if head is not None and layout is not None:
            layout_loss = head(layout[rows])
            stage.note(layout=layout_loss.item())
            loss = loss + settings.layout * layout_loss
        stage.learn(loss)
    transformer.set_attn_processor(dict(stock))
    if head is not None:
        head.hook.remove()
    stage.finish()


def _batch(
    data: FlowData, settings: FlowSettings, generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    """Draw rows and their captions, of which some are dropped."""
    rows = data.draw(settings.batch, generator)
    captions = data.captions(rows.tolist(), generator)
    dropped = torch.rand(settings.batch, generator=generator) < settings.drop
    return rows, ["" if d else c for d, c in zip(dropped.tolist(), captions, strict=True)]


def _noise_levels(count: int, generator: torch.Generator, uniform: bool) -> Tensor:
    """Draw noise levels in [0, 1]; both kinds are drawn, so that each step uses as many numbers."""
    even = torch.rand(count, generator=generator)
    normal = torch.randn(count, generator=generator) * 1.2 + 0.4
    return even if uniform else normal.sigmoid()
