"""The pocket reads captions with a small tokenizer and small text encoders of ``transformers``."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from dgpo.pocket.scenes import COLORS, NUMBERS, PLURALS, SHAPES

TOKENS = 12
"""The text length: the longest caption of either skill, with its start and end tokens."""
TEXT_WIDTH = 64
"""The width of each text encoder."""

_WORDS = ("a", "photo", "of", "and", "left", "right", "above", "below", "sign", "that", "says")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def build_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer for the words of the captions; other text falls back to characters."""
    words = sorted({*_WORDS, *COLORS, *NUMBERS, *SHAPES, *PLURALS.values()})
    merges = _learn_merges(words)
    vocab = [*_LETTERS, *(f"{c}</w>" for c in _LETTERS), *("".join(pair) for pair in merges)]
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    merged: Any = merges  # pairs, as the tokenizer's own files hold them
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)}, merges=merged, model_max_length=TOKENS
    )


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges that make every word one token, the most frequent pair first.

    The alphabet breaks ties; the trainer of ``tokenizers`` breaks them differently in each run.
    """
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for pieces in split for pair in pairwise(pieces)):
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((left, right))
        for pieces in split:
            for i in range(len(pieces) - 1):
                if pieces[i : i + 2] == [left, right]:
                    pieces[i : i + 2] = [left + right]
    return merges


def build_text_encoder(tokenizer: CLIPTokenizer, layers: int = 3) -> CLIPTextModelWithProjection:
    """Build one of the two text encoders; the pipeline reads its last but one hidden state."""
    ids: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=TEXT_WIDTH // 32,
            max_position_embeddings=TOKENS,
            **ids,
            hidden_act="quick_gelu",
        )
    )
    for name, parameter in encoder.named_parameters():
        if "embedding" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder
