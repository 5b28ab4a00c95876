"""Measure what a process holds before anything is loaded: the interpreter and its libraries."""

from __future__ import annotations

import importlib
import resource
from pathlib import Path

import torch
from torch import nn

_IMPORTED = ("dgpo.trainer", "torch.utils.tensorboard", "matplotlib.backends.backend_agg")
"""Modules that a run imports sooner or later."""


def resident() -> int:
    """Return the bytes that this process has in memory now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * resource.getpagesize()


def libraries() -> int:
    """Return :func:`resident` bytes once the code of a run lies in memory.

    All that a run imports is imported. A few small operations bring in the pages that are read when
    they are first executed.
    """
    for module in _IMPORTED:
        importlib.import_module(module)
    with torch.random.fork_rng():
        pixels = torch.randn(2, 4, 16, 16)
        picture = nn.Sequential(
            nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 4, 3)
        )
        tokens = torch.randn(2, 2, 16, 8, requires_grad=True)
        words = nn.Sequential(nn.Linear(8, 32), nn.GELU("tanh"), nn.Linear(32, 8), nn.LayerNorm(8))
    seen = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
    (picture(pixels).square().mean() + words(seen).square().mean()).backward()
    trained = [*picture.parameters(), *words.parameters()]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    torch.optim.AdamW(trained, fused=True).step()
    return resident()
