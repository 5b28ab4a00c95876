"""Several algorithms minimise the clipped surrogate of PPO (arXiv 1707.06347, eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor


def ppo(
    log_ratio: Tensor, advantages: Tensor, clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return PPO's terms for ``r = exp(log_ratio)`` and the figures to report, all ``[B]``.

    The figures are the ratio and, unless ``clip`` is None, where the clip stops the gradient.
    """
    ratio = log_ratio.exp()
    figures = {"ratio": ratio}
    if clip is not None:
        figures["clipped"] = stopped_by_clip(ratio, advantages, clip)
    return clipped_surrogate(ratio, advantages, clip), figures


def stopped_by_clip(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Return 1 where :func:`clipped_surrogate` has no gradient, else 0; all ``[B]``."""
    return torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip).to(ratio)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip: float | None) -> Tensor:
    """Return ``max(-A r, -A clip(r, 1 - c, 1 + c))``, all ``[B]``; a clip of None clips nothing.

    A sample has no gradient once it has moved beyond ``clip`` in the direction of its advantage.

    >>> clipped_surrogate(torch.tensor([1.5, 0.5]), torch.tensor([1.0, 1.0]), clip=0.2)
    tensor([-1.2000, -0.5000])
    """
    plain = -advantages * ratio
    if clip is None:
        return plain
    return torch.maximum(plain, -advantages * ratio.clamp(1 - clip, 1 + clip))
