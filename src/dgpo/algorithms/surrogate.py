"""The clipped surrogate of PPO, which several algorithms minimise."""

from __future__ import annotations

import torch
from torch import Tensor


def stopped_by_clip(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Where :func:`clipped_surrogate` has no gradient, as 0 and 1; all ``[B]``."""
    return torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip).to(ratio)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip: float | None) -> Tensor:
    """``max(-A r, -A clip(r, 1 - c, 1 + c))``, all ``[B]``: a sample beyond ``clip`` in its own
    direction has no gradient. None for no clip. Source: PPO (arXiv 1707.06347), eq. 7."""
    plain = -advantages * ratio
    if clip is None:
        return plain
    return torch.maximum(plain, -advantages * ratio.clamp(1 - clip, 1 + clip))
