"""Teach the text encoders to read before the transformer learns to draw.

Large text-to-image models start from text encoders that were pretrained on captions.  The pocket's
two learn, in a minute, to tell from their hidden states what the caption names: linear heads read
every attribute from the pooled vector, and from the state at the end of the text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dgpo.pocket.build import TEXT_WIDTH, TOKENS, build_text_encoder
from dgpo.pocket.pretrain.common import Stage, schedule


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [N, 12], as the pipeline makes them."""
    return tokenizer(
        captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def encode_text(
    encoders: tuple[CLIPTextModelWithProjection, ...], ids: Tensor
) -> tuple[Tensor, Tensor]:
    """What the pipeline makes of token ids [B, 12]: embeddings [B, 12, 128] and pooled [B, 128]."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    hidden = torch.cat([o.hidden_states[-2] for o in outputs], -1)
    return hidden, torch.cat([o.text_embeds for o in outputs], -1)


def _id(token: Any) -> int:
    return int(token)


def train_text_encoders(
    folder: Path,
    tokenizer: CLIPTokenizer,
    captions: list[str],
    labels: Tensor,
    steps: int = 1500,
    batch: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """Train both encoders to make every attribute of a caption linearly readable.

    Args:
        captions: all distinct captions, N of them.
        labels: int64 [N, A], A attributes of each; -1 where the caption says nothing of it.
    """
    torch.manual_seed(seed)
    encoders = (build_text_encoder(tokenizer), build_text_encoder(tokenizer))
    ids = tokenize(tokenizer, captions)
    sizes = [int(labels[:, a].max()) + 2 for a in range(labels.shape[1])]
    heads = nn.ModuleList([nn.Linear(TEXT_WIDTH, sum(sizes)) for _ in range(4)])
    targets = (labels + 1).T  # class 0: not said
    ends = ids.eq(_id(tokenizer.eos_token_id)).long().argmax(1)
    modules: list[nn.Module] = [*encoders, heads]
    parameters = [p for m in modules for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    stage = Stage(folder, modules, [optimizer], steps, seed)

    def attributes(rows: Tensor) -> list[Tensor]:
        read = []
        for index, encoder in enumerate(encoders):
            output = encoder(ids[rows], output_hidden_states=True)
            end = output.hidden_states[-2][torch.arange(len(rows)), ends[rows]]
            read += [heads[2 * index](output.text_embeds), heads[2 * index + 1](end)]
        return read

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        rows = torch.arange(len(captions))
        right = [
            (part.argmax(1) == target).float().mean().item()
            for read in attributes(rows)
            for part, target in zip(read.split(sizes, 1), targets, strict=True)
        ]
        return {"right": sum(right) / len(right), "worst": min(right)}

    for step in stage.run(evaluate, every=500):
        schedule(optimizer, step, steps)
        rows = torch.randint(0, len(captions), (batch,), generator=stage.generator(step))
        losses = [
            nn.functional.cross_entropy(part, target[rows])
            for read in attributes(rows)
            for part, target in zip(read.split(sizes, 1), targets, strict=True)
        ]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        stage.note(loss=loss.item())
    with torch.no_grad():
        for value, parameter in zip(stage.average.values, parameters, strict=True):
            parameter.copy_(value)
    return encoders
