"""Teach the text encoders to read before the transformer learns to draw.

Large text-to-image models start from text encoders that were pretrained on captions. The pocket's
two encoders learn in a minute what a caption names. Linear heads read every attribute from the
pooled vector and from the state at the end of the text. They read the attributes of each noun from
its own state. After that the encoders are frozen, as those of large models are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dgpo.pocket.text import TEXT_WIDTH, TOKENS, build_text_encoder
from tools.pretrain.common import Stage, Training


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return token ids [N, 12], as the pipeline makes them."""
    return tokenizer(
        captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def encode_text(
    encoders: tuple[CLIPTextModelWithProjection, ...], ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Encode token ids [B, 12] as the pipeline does: [B, 12, 128], and pooled [B, 128]."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    hidden = torch.cat([o.hidden_states[-2] for o in outputs], -1)
    return hidden, torch.cat([o.text_embeds for o in outputs], -1)


def train_text_encoders(
    folder: Path,
    tokenizer: CLIPTokenizer,
    captions: list[str],
    labels: Tensor,
    word_labels: Tensor | None,
    training: Training,
) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """Train both encoders to make every attribute of a caption linearly readable.

    Args:
        folder: the stage's folder.
        tokenizer: the encoders' tokenizer.
        captions: all distinct captions, N of them.
        labels: int64 [N, A], A attributes of each; -1 where the caption does not name one.
        word_labels: int64 [N, 10, B], B attributes of what each word is about; -1 where the caption
            does not name one, -2 for a word that is about nothing. None: only whole captions are
            read.
        training: steps, batch, learning rate and seed.
    """
    torch.manual_seed(training.seed)
    reader = _Reader(tokenizer, captions, labels, word_labels)
    optimizer = torch.optim.AdamW(
        reader.parameters(), lr=training.lr, weight_decay=0.01, betas=(0.9, 0.98)
    )
    stage = Stage(folder, [reader], [optimizer], training.steps, training.seed)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        pairs = reader(torch.arange(len(captions)))
        right = [(part.argmax(1) == target).float().mean().item() for part, target in pairs]
        return {"right": sum(right) / len(right), "worst": min(right)}

    for step in stage.run(evaluate, every=200, hold=0.5):
        generator = stage.generator(step)
        rows = torch.randint(0, len(captions), (training.batch,), generator=generator)
        losses = [nn.functional.cross_entropy(part, target) for part, target in reader(rows)]
        loss = torch.stack(losses).mean()
        stage.learn(loss)
        stage.note(loss=loss.item())
    stage.finish()
    first, second = (encoder.requires_grad_(False) for encoder in reader.encoders)
    return first, second


class _Reader(nn.Module):
    """Two text encoders, and linear heads that read captions' attributes from their states."""

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        captions: list[str],
        labels: Tensor,
        word_labels: Tensor | None,
    ):
        super().__init__()
        self.encoders: Any = nn.ModuleList([build_text_encoder(tokenizer) for _ in range(2)])
        self.ids = tokenize(tokenizer, captions)
        end: Any = tokenizer.eos_token_id
        self.ends = self.ids.eq(int(end)).long().argmax(1)
        self.targets, self.sizes = _targets(labels)
        self.reads_words = word_labels is not None
        words = labels[:, None] if word_labels is None else word_labels
        self.word_targets, self.word_sizes = _targets(words)
        heads = [nn.Linear(TEXT_WIDTH, sum(self.sizes)) for _ in range(4)]
        heads += [nn.Linear(TEXT_WIDTH, sum(self.word_sizes)) for _ in range(2)]
        self.heads = nn.ModuleList(heads)

    def forward(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the logits [.., classes] of every attribute and the right classes [..]."""
        pairs, targets = [], self.targets[rows]
        for index, encoder in enumerate(self.encoders):
            output = encoder(self.ids[rows], output_hidden_states=True)
            states = output.hidden_states[-2]
            end = states[torch.arange(len(rows)), self.ends[rows]]
            heads = self.heads[2 * index : 2 * index + 2]
            for head, state in zip(heads, (output.text_embeds, end), strict=True):
                pairs += zip(head(state).split(self.sizes, 1), targets.unbind(1), strict=True)
            if self.reads_words:
                wanted = self.word_targets[rows]
                said = wanted[..., 0] >= 0
                words = self.heads[4 + index](states[:, 1 : 1 + wanted.shape[1]][said])
                pairs += zip(words.split(self.word_sizes, 1), wanted[said].unbind(1), strict=True)
        return pairs


def _targets(labels: Tensor) -> tuple[Tensor, list[int]]:
    """Return the classes, with 0 for what is not named, and each attribute's number of classes."""
    sizes = [int(highest) + 2 for highest in labels.flatten(0, -2).amax(0)]
    return labels + 1, sizes


class CaptionTable:
    """The embeddings of captions by frozen encoders, which encode each caption once.

    Args:
        tokenizer: the encoders' tokenizer.
        encoders: the pipeline's text encoders.
        encode: encodes token ids as the pipeline does, ``(encoders, ids) -> (embeddings, pooled)``.
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
        """Return embeddings [B, 12, width] and pooled vectors [B, width]."""
        if new := sorted({*captions} - {*self.known}):
            hidden, pooled = self.encode(self.encoders, tokenize(self.tokenizer, new))
            self.known |= dict(zip(new, zip(hidden, pooled, strict=True), strict=True))
        rows = [self.known[caption] for caption in captions]
        return torch.stack([h for h, _ in rows]), torch.stack([p for _, p in rows])
