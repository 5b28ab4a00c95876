"""Add up the memory and the operations of code that runs without numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Need:
    """What a call needs.

    Args:
        memory: the largest number of bytes that the tensors made by it hold at one time.
        flops: the operations of its matrix products, convolutions and attention; a multiplication
            and an addition are two.
    """

    memory: int
    flops: int


class Live(TorchDispatchMode):
    """``Live`` adds up the storages that are made inside the block, for as long as they live, and
    the operations of products.

    Attributes:
        now: the bytes that live.
        peak: the most that have lived.
        flops: the operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.flops = 0
        self._known: set[int] = set()

    def of(self, call: Callable[[], Any]) -> tuple[Any, Need]:
        """Return what a call makes, and what it needs, which is not added up."""
        now, peak, flops = self.now, self.peak, self.flops
        self.peak = now
        made = call()
        found = Need(self.peak - now, self.flops - flops)
        self.peak, self.flops = peak, flops
        return made, found

    def add(self, need: Need) -> None:
        """Add up what something needs that is not run."""
        self.peak = max(self.peak, self.now + need.memory)
        self.flops += need.flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # an operation may return a view of a tensor that was there before, such as a weight
        for tensor in _tensors((*args, *(kwargs or {}).values())):
            self._meet(tensor, counts=False)
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors((made,)):
            self._meet(tensor)
        counted = flop_registry.get(func.overloadpacket)
        if counted is not None:
            self.flops += counted(*args, **(kwargs or {}), out_val=made)
        return made

    def _meet(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.is_meta and key not in self._known:
            size = storage.nbytes() if counts else 0
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
