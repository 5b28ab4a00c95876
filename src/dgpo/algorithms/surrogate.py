"""The clipped surrogate of PPO, which several algorithms minimise."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip: float | None) -> Tensor:
    """``max(-A r, -A clip(r, 1 - c, 1 + c))``, all ``[B]``: a sample beyond ``clip`` in its own
    direction has no gradient. None for no clip. Source: PPO (arXiv 1707.06347), eq. 7."""
    plain = -advantages * ratio
    if clip is None:
        return plain
    return torch.maximum(plain, -advantages * ratio.clamp(1 - clip, 1 + clip))
