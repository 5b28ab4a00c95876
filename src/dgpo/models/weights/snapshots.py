"""Copies of weights that lag behind: frozen references and exponential moving averages.

Weights are put in place by exchanging storage, not by copying. What was there before comes back
bit for bit, and a graph that was built before the exchange still finds its own tensors at backward.
Pieces of sharded weights are copied, because the sharding keeps their storage; its graphs gather
the weights again at backward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dgpo.distributed.sharding import is_sharded, local
from dgpo.errors import UserError
from dgpo.models.weights.restoring import restoring


@contextmanager
def exchanged(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block ``parameters`` hold ``values``; after it they hold their own storage again.

    Nothing is copied where device and dtype agree and nothing is sharded. Do not train inside the
    block.
    """
    # a piece is overwritten and so is cloned; other storage is only put aside
    own = [local(p).clone() if is_sharded(p) else p.data for p in parameters]

    def restore() -> None:
        for parameter, data in zip(parameters, own, strict=True):
            _hold(parameter, data)

    with restoring(restore):
        for parameter, value in zip(parameters, values, strict=True):
            _hold(parameter, local(value).to(device=parameter.device, dtype=parameter.dtype))
        yield


def _hold(parameter: nn.Parameter, value: Tensor) -> None:
    if is_sharded(parameter):
        local(parameter).copy_(value)  # the sharding gathers from the storage it was given
    else:
        parameter.data = value


class Snapshot:
    """A ``Snapshot`` is a moving average of ``parameters``, which begins as a copy of them.

    ``shadow <- decay * shadow + (1 - decay) * parameter``

    Args:
        parameters: what is averaged.
        device: where the copy lives; None for beside the parameters.
        weights: what passes compute with, in any precision; None for the parameters.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        device: torch.device | str | None = None,
        weights: Sequence[nn.Parameter] | None = None,
    ) -> None:
        self._parameters = list(parameters)
        self._weights = self._parameters if weights is None else list(weights)
        self._shadow = [p.detach().to(device or p.device, copy=True) for p in self._parameters]

    @property
    def tensors(self) -> list[Tensor]:
        """Return the averaged weights, in the order of the parameters and sharded as they are."""
        return self._shadow

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move towards the parameters: a decay of 0 copies them, a decay of 1 changes nothing.

        Raises:
            UserError: ``decay`` is outside [0, 1].
        """
        if not 0.0 <= decay <= 1.0:
            raise UserError(f"the decay of a moving average must be in [0, 1], got {decay}")
        if not self._shadow:
            return
        shadow = [local(tensor) for tensor in self._shadow]
        current = [
            local(p.detach()).to(s.device) for p, s in zip(self._parameters, shadow, strict=True)
        ]
        torch._foreach_lerp_(shadow, current, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside the block passes compute with the averaged weights."""
        with exchanged(self._weights, self._shadow):
            yield


def fingerprints(modules: Iterable[Any], left_out: Sequence[Tensor]) -> dict[str, int]:
    """Return the sum of the bits of every weight and buffer of ``modules``, by name.

    It shows whether one has moved, without a copy as large as the model.

    Args:
        modules: networks; anything else is passed over.
        left_out: tensors of theirs that may move.
    """
    known = {id(tensor) for tensor in left_out}
    return {
        f"{type(module).__name__}.{name}": _bits(tensor)
        for module in modules
        if isinstance(module, nn.Module)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if id(tensor) not in known
    }


def base_fingerprints(components: Mapping[str, Any]) -> dict[str, str]:
    """Return a short text for the weights of every component, by its name.

    It is the same on any device, and another one after training, with a LoRA inside, or in another
    precision. Buffers are left out, because some are computed on the device. The numbers of weights
    on ``meta``, where offloading leaves them, are left out too.
    """
    found = {}
    for name, module in components.items():
        if isinstance(module, nn.Module):
            digest = hashlib.sha256()
            for weight in module.parameters():
                bits = None if weight.is_meta else _bits(weight)
                digest.update(f"{tuple(weight.shape)} {weight.dtype} {bits}\n".encode())
            found[name] = digest.hexdigest()[:16]
    return found


def _bits(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # a quantised weight wraps numbers and scales
        names, _ = tensor.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        return sum(_bits(getattr(tensor, name)) for name in names)
    # integers add up alike in any order, which floats do not
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    values = tensor.detach().contiguous().reshape(-1)
    return int(values.view(whole[values.element_size()]).sum(dtype=torch.int64))
