"""Teach the text encoders to read before the transformer learns to draw.

Large text-to-image models start from text encoders that were pretrained on captions.  The pocket's
two learn, in a minute, to tell from their hidden states what the caption names: linear heads read
every attribute from the pooled vector and from the state at the end of the text, and from the state
of each noun what is said of it.  After that they are frozen, as large models' encoders are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dgpo.pocket.text import TEXT_WIDTH, TOKENS, build_text_encoder
from tools.pretrain.common import Stage, schedule


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
    word_labels: Tensor | None = None,
    steps: int = 600,
    batch: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """Train both encoders to make every attribute of a caption linearly readable.

    Args:
        captions: all distinct captions, N of them.
        labels: int64 [N, A], A attributes of each; -1 where the caption says nothing of it.
        word_labels: int64 [N, 10, B], B attributes of what each word is about; -1 where that is
            not said, -2 for a word that is about nothing.
    """
    torch.manual_seed(seed)
    encoders = (build_text_encoder(tokenizer), build_text_encoder(tokenizer))
    ids = tokenize(tokenizer, captions)
    targets, sizes = _targets(labels)
    word_targets, word_sizes = _targets(labels[:, None] if word_labels is None else word_labels)
    heads = nn.ModuleList([nn.Linear(TEXT_WIDTH, sum(sizes)) for _ in range(4)])
    heads += [nn.Linear(TEXT_WIDTH, sum(word_sizes)) for _ in range(2)]
    ends = ids.eq(_id(tokenizer.eos_token_id)).long().argmax(1)
    modules: list[nn.Module] = [*encoders, heads]
    parameters = [p for m in modules for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    stage = Stage(folder, modules, [optimizer], steps, seed)

    def read(rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Logits [.., classes] of every attribute and the classes [..] that are right."""
        pairs = []
        for index, encoder in enumerate(encoders):
            output = encoder(ids[rows], output_hidden_states=True)
            states = output.hidden_states[-2]
            end = states[torch.arange(len(rows)), ends[rows]]
            for head, state in zip(heads[2 * index :], (output.text_embeds, end), strict=False):
                pairs += zip(head(state).split(sizes, 1), targets[rows].unbind(1), strict=True)
            if word_labels is not None:
                wanted = word_targets[rows]
                said = wanted[..., 0] >= 0
                words = heads[4 + index](states[:, 1 : 1 + wanted.shape[1]][said])
                pairs += zip(words.split(word_sizes, 1), wanted[said].unbind(1), strict=True)
        return pairs

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        pairs = read(torch.arange(len(captions)))
        right = [(part.argmax(1) == target).float().mean().item() for part, target in pairs]
        return {"right": sum(right) / len(right), "worst": min(right)}

    for step in stage.run(evaluate, every=200):
        schedule(optimizer, step, steps)
        rows = torch.randint(0, len(captions), (batch,), generator=stage.generator(step))
        losses = [nn.functional.cross_entropy(part, target) for part, target in read(rows)]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        stage.note(loss=loss.item())
    with torch.no_grad():
        for value, parameter in zip(stage.average.values, parameters, strict=True):
            parameter.copy_(value)
    for encoder in encoders:
        encoder.requires_grad_(False)
    return encoders


def _targets(labels: Tensor) -> tuple[Tensor, list[int]]:
    """Classes, 0 for what is not said, and the number of classes of each attribute."""
    sizes = [int(highest) + 2 for highest in labels.flatten(0, -2).amax(0)]
    return labels + 1, sizes


class CaptionTable:
    """Embeddings of captions by frozen encoders; each caption is encoded once.

    Args:
        tokenizer: of the encoders.
        encoders: the pipeline's.
        encode: what the pipeline makes of token ids, ``(encoders, ids) -> (embeddings, pooled)``.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        encoders: tuple[Any, ...],
        encode: Callable[[Any, Tensor], tuple[Tensor, Tensor]] = encode_text,
    ):
        self.tokenizer, self.encoders, self.encode = tokenizer, encoders, encode
        self.known: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, 12, width] and pooled [B, width]."""
        if new := sorted({*captions} - {*self.known}):
            hidden, pooled = self.encode(self.encoders, tokenize(self.tokenizer, new))
            self.known |= dict(zip(new, zip(hidden, pooled, strict=True), strict=True))
        rows = [self.known[caption] for caption in captions]
        return torch.stack([h for h, _ in rows]), torch.stack([p for _, p in rows])
