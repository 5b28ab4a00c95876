"""Back to where an update began, if it is stopped between its optimiser steps."""

from __future__ import annotations

from typing import Any

import torch

from dgpo.models.policy import Policy


class UpdateBackup:
    """A copy, on the CPU, of all that optimiser steps change: weights, their averages, moments.

    Args:
        policy: what is trained.
        optimizer: its optimiser.
    """

    def __init__(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        self._parameters, self._optimizer = policy.parameters(), optimizer
        self._tensors = [*self._parameters, *policy.old.tensors, *policy.slow.tensors]
        self._kept = [_kept(tensor) for tensor in self._tensors]
        self._moments: list[dict[str, Any]] = [
            {name: _kept(value) for name, value in optimizer.state[parameter].items()}
            if parameter in optimizer.state
            else {}
            for parameter in self._parameters
        ]

    @torch.no_grad()
    def back(self) -> None:
        """Everything is, bit for bit, as it was when this was made."""
        for tensor, kept in zip(self._tensors, self._kept, strict=True):
            tensor.copy_(kept)
        for parameter, moments in zip(self._parameters, self._moments, strict=True):
            if not moments:  # before the first step of all there are none
                self._optimizer.state.pop(parameter, None)
            for name, kept in moments.items():
                self._optimizer.state[parameter][name].copy_(kept)


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    # to pinned memory a GPU copies in its own time, before the steps that change the tensor
    kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return kept.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
