"""Float32 masters of trained weights that compute in half precision (arXiv 1710.03740).

A step of the optimiser is mostly smaller than the rounding of a weight in half precision, and so is
what an average moves. Both happen in float32, and passes compute with what that rounds to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dgpo.distributed.sharding import local


class Masters:
    """``Masters`` are what is trained: the weights themselves, or float32 copies of narrower ones.

    A gradient reaches a copy in float32 and leaves the weight as soon as it is complete, so that
    those of several backward passes add up in float32.

    Args:
        weights: parameters of modules, sharded or not, that have gradients.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = list(weights)
        """What passes compute with."""
        self.parameters: list[nn.Parameter] = []
        """What is trained, in the order of the weights."""
        for weight in self.weights:
            master = weight
            if weight.dtype.itemsize < 4:
                master = nn.Parameter(weight.detach().float())
                weight.register_post_accumulate_grad_hook(_widen_into(master))
            self.parameters.append(master)
        pairs = zip(self.weights, self.parameters, strict=True)
        self._narrow = [(weight, master) for weight, master in pairs if weight is not master]

    @property
    def copies(self) -> list[nn.Parameter]:
        """Return the masters that are not the weights themselves."""
        return [master for _, master in self._narrow]

    @torch.no_grad()
    def write(self) -> None:
        """Round the masters into the weights.

        It is done anew for each pass: who kept it would have to know of every way in which masters
        move.
        """
        if self._narrow:
            # by ``data``, for a graph of the policy that is still to be used: its numbers stay
            held = [local(weight.data) for weight, _ in self._narrow]
            torch._foreach_copy_(held, [local(master.data) for _, master in self._narrow])  # pyright: ignore[reportPrivateImportUsage]


def _widen_into(master: nn.Parameter) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def widen(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad += gradient

    return widen
