"""All prompts of a run are encoded before it: in batches, and by all processes together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from dgpo.distributed.processes import SINGLE, Processes
from dgpo.models.pipeline.prompt_cache import Embedding
from dgpo.models.pipeline.prompt_encoder import PromptEncoder

TOGETHER = 16
"""How many prompts are encoded at once."""
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far an embedding may be from the one that the prompt has alone, in parts of its largest
number, to count as the same."""


def encode_ahead(encoder: PromptEncoder, prompts: Iterable[str], processes: Processes) -> None:
    """Write the embeddings of prompts to the prompt cache, each in one of the processes.

    Prompts are encoded :data:`TOGETHER` at a time, always so many, if the pipeline gives them the
    embeddings that they have alone, but for what a product of another size rounds. Collective.

    Args:
        encoder: has a prompt cache.
        prompts: all of them; those that the cache holds cost nothing.
        processes: the processes of the run.
    """
    distinct = list({encoder.key(prompt): prompt for prompt in prompts}.values())

    def missing() -> list[int]:
        disk = encoder.disk
        assert disk is not None
        return [n for n, prompt in enumerate(distinct) if not disk.holds(encoder.file(prompt))]

    # one process looks, so that all divide the same prompts
    wanted = processes.broadcast_object(missing, "the prompts to encode")
    _write(encoder, [distinct[place] for place in wanted], processes)
    processes.all_gather_object(len(wanted), "the end of encoding")
    # another machine may have a folder of its own, where what others wrote is missing
    _write(encoder, [distinct[place] for place in missing()], SINGLE)
    encoder.negative()


def _write(encoder: PromptEncoder, prompts: Sequence[str], processes: Processes) -> None:
    """Encode this process's part of the prompts, and write it to the prompt cache."""
    assert encoder.disk is not None
    size = TOGETHER if len(prompts) >= TOGETHER and _as_if_alone(encoder, prompts) else 1
    parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    mine = parts[processes.rank :: processes.size]
    console = Console(stderr=True, quiet=not processes.main or len(prompts) < TOGETHER)
    for part in track(mine, f"encoding {len(prompts):,} prompts", console=console):
        for prompt, embedding in zip(part, _embeddings(encoder, part, size), strict=True):
            encoder.disk.save(encoder.file(prompt), embedding)


def _embeddings(encoder: PromptEncoder, prompts: Sequence[str], size: int) -> list[Embedding]:
    """Return the embeddings of at most ``size`` prompts, encoded as so many at once."""
    if size == 1:
        return [encoder.encoded(prompt) for prompt in prompts]
    filled = [*map(str, prompts), *[str(prompts[-1])] * (size - len(prompts))]
    every = encoder.encoded(filled)
    return [
        {name: _row_of(value, row, size) for name, value in every.items()}
        for row in range(len(prompts))
    ]


def _row_of(value: Any, row: int, rows: int) -> Any:
    """Return what is one prompt's of the embedding of several."""
    if value is None:
        return None
    if not isinstance(value, (Tensor, list)) or len(value) != rows:
        raise ValueError(f"{type(value).__name__}: not one for each of {rows} prompts")
    return value[row : row + 1]


def _as_if_alone(encoder: PromptEncoder, prompts: Sequence[str]) -> bool:
    """Return whether prompts that are encoded together have the embeddings that each has alone:
    tried with the shortest and the longest of them."""
    extremes = [min(prompts, key=len), max(prompts, key=len)]
    try:
        together = _embeddings(encoder, extremes, TOGETHER)
    except Exception:  # whatever a list of prompts leads to; they are encoded one by one
        return False
    return all(map(_alike, together, map(encoder.encoded, extremes)))


def _alike(one: Embedding, other: Embedding) -> bool:
    """Return whether two embeddings are equal but for rounding."""
    return one.keys() == other.keys() and all(_close(one[name], other[name]) for name in one)


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    far = (one.double() - other.double()).abs().max()
    return bool(far <= ROUNDING.get(one.dtype, 0.0) * other.double().abs().max())
