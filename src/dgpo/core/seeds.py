"""Every random draw of a run is a function of the run's seed and of what the draw is for."""

from __future__ import annotations

import hashlib

import torch


def seed_for(*parts: int | str) -> int:
    """Return a 63-bit seed made of the run's seed and a purpose.

    So no random state has to be saved: a resumed run draws what it would have drawn.

    >>> seed_for(0, "noise", 3) == seed_for(0, "noise", 3)
    True
    >>> seed_for(0, "noise", 3) == seed_for(0, "noise", 4)
    False
    """
    # a separator that no purpose contains: (1, 23) and (12, 3) must not share a seed
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stream(*parts: int | str) -> torch.Generator:
    """Return a CPU generator that is seeded by :func:`seed_for`."""
    return torch.Generator().manual_seed(seed_for(*parts))
