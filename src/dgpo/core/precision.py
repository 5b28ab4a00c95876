"""There is one rule for precision: numbers are compared and squared in float32 or float64.

Trust regions of DGPO are as narrow as 1e-5. A bfloat16 number near one has a spacing of 8e-3, so
half-precision inputs are widened before the first arithmetic operation, not after it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def widen_pair(a: Tensor, b: Tensor, names: str) -> tuple[Tensor, Tensor]:
    """Return two tensors of equal shape in their common full precision.

    Args:
        a, b: any equal shapes, any floating dtypes.
        names: how the message calls the two, e.g. ``"x0 and noise"``.

    Raises:
        ValueError: the shapes differ. Broadcasting would silently mix samples here.
    """
    if a.shape != b.shape:
        raise ValueError(f"{names} must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = widen(a), widen(b)
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Return each sample's mean of ``(a - b)^2`` over all dims but the first, in full precision.

    Args:
        a, b: ``[B, ...]``, one shape.

    Returns:
        ``[B]``, float32, or float64 if either input is float64. Differentiable.

    Raises:
        ValueError: the shapes differ.

    >>> mean_square(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([5.])
    """
    a, b = widen_pair(a, b, "the two sides of a squared error")
    return (a - b).square().flatten(1).mean(1)
