"""Train the transformer by flow matching, on captions as frozen text encoders read them."""

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
from tools.pretrain.common import Stage, schedule


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
    ``layout``, int64 [N, image tokens, attributes], is what each patch shows, if that is taught.
    ``weights`` [N] say how often a row is drawn, relative to others; none: all equally.
    """

    latents: Tensor
    captions: Callable[[list[int], torch.Generator], list[str]]
    layout: Tensor | None = None
    weights: Tensor | None = None

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows for a batch, int64 [count], with replacement."""
        if self.weights is None:
            return torch.randint(0, len(self.latents), (count,), generator=generator)
        return torch.multinomial(self.weights, count, replacement=True, generator=generator)


class LayoutHead(nn.Module):
    """Reads from the middle of the transformer what each patch of the picture is to show.

    It shapes the hidden states while the transformer learns and is thrown away afterwards:
    denoising alone teaches a small network late which words belong together and where things go.

    Args:
        block: the block whose image tokens are read.
        layout: what patches show, for the number of classes of each attribute.
        width: of an image token.
        tokens: the image tokens [B, tokens, width] in what the block returns.
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
        """Cross-entropy of the last pass against what its patches show, int64 [B, tokens, A]."""
        assert self.states is not None
        logits = self.read(self.states).flatten(0, 1).split(self.sizes, 1)
        targets = layout.flatten(0, 1).unbind(1)
        return sum(map(F.cross_entropy, logits, targets), self.states.new_zeros(()))


@dataclass(frozen=True)
class FlowSettings:
    """Optimisation of a transformer stage."""

    steps: int
    batch: int = 128
    lr: float = 1.5e-3
    muon_lr: float | None = 0.02
    drop: float = 0.1
    layout: float = 0.5
    hold: float = 0.5
    report: int = 1000


def make_optimizers(
    transformer: SD3Transformer2DModel,
    head: nn.Module | None,
    settings: FlowSettings,
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (if ``muon_lr``), AdamW for everything else."""
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
    seed: int = 0,
) -> None:
    """Minimise ``mean (v - (noise - x0))^2`` at ``x_s = (1 - s) x0 + s noise``.

    Half of the noise levels are uniform, half logit-normal; captions are dropped with probability
    ``drop``.  Where the data says what patches show, ``settings.layout`` times the loss of a
    :class:`LayoutHead` is added.  At the end the transformer holds the averaged weights.
    """
    torch.manual_seed(seed)
    layout = data.layout if settings.layout else None
    middle = transformer.transformer_blocks[len(transformer.transformer_blocks) // 2 - 1]
    head = LayoutHead(middle, layout) if layout is not None else None
    modules = [transformer, *([head] if head else [])]
    optimizers = make_optimizers(transformer, head, settings)
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
        rows = data.draw(settings.batch, generator)
        captions = data.captions(rows.tolist(), generator)
        dropped = torch.rand(settings.batch, generator=generator) < settings.drop
        captions = ["" if d else c for d, c in zip(dropped.tolist(), captions, strict=True)]
        x0 = data.latents[rows]
        noise = torch.randn(x0.shape, generator=generator)
        uniform = torch.rand(settings.batch, generator=generator)
        normal = torch.randn(settings.batch, generator=generator) * 1.2 + 0.4
        sigma = uniform if step % 2 else normal.sigmoid()
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
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
    transformer.set_attn_processor(dict(stock))
    if head is not None:
        head.hook.remove()
    with torch.no_grad():
        for value, parameter in zip(stage.average.values, parameters, strict=True):
            parameter.copy_(value)
