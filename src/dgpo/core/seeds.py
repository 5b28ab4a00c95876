"""Random numbers by name: every draw of a run is a function of the seed and of what it is for."""

from __future__ import annotations

import hashlib

import torch


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed from the run's seed and a purpose: ``seed_for(0, "noise", iteration, level)``.

    No stream has a state to save: a run that resumes draws what it would have drawn.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stream(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`seed_for`."""
    return torch.Generator().manual_seed(seed_for(*parts))
