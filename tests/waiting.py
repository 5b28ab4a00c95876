"""A device that is none, and everything in a program that would wait for it.

For torch its tensors lie on the meta device; their numbers lie beside them, on the CPU. So every
operation gives its numbers, and all that crosses between host and device is seen, as on a GPU. What
waits there: a number that is read, a copy that is not asked to go on its own, an index that lies on
the other side, and an operation whose result has as many entries as the numbers say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
META = torch.device("meta")
_COUNTED_BY_NUMBERS = (aten.nonzero, aten.masked_select, aten._unique2, aten.is_nonzero, aten.equal)
_KEPT_APART = {"device", "pin_memory"}


class Held(Tensor):
    """A tensor of the device; ``numbers`` is what it holds."""

    is_cuda = True  # what asks for it is what would wait
    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Held:
        made = Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=META,
        )
        made.numbers = numbers
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"Held({self.numbers})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the device's block")


class Device(TorchDispatchMode):
    """Runs what is asked of the device inside the block, and counts the waits for it by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def hold(self, numbers: Tensor) -> Tensor:
        return Held(numbers.detach().clone())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        held = any(isinstance(x, Held) for x in tensors)
        on_device = held
        packet, device = func.overloadpacket, kwargs.get("device")
        if packet is aten._to_copy and device is not None:
            on_device = device.type == "meta"
            if on_device != held and not kwargs.get("non_blocking"):
                self.waits["send" if on_device else "copy"] += 1
        elif packet is aten.copy_:
            here, there = (isinstance(x, Held) for x in args[:2])
            free = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if here != there and not free:
                self.waits["send" if here else "copy"] += 1
        elif device is not None:
            on_device = device.type == "meta"
        elif held:
            self._look(packet, tensors)
        on_host = {**kwargs, **({"device": torch.device("cpu")} if device is not None else {})}
        on_host.pop("pin_memory", None)
        numbers = tree_map_only(Held, lambda x: x.numbers, (args, on_host))
        made = func(*numbers[0], **numbers[1])
        if func._schema.is_mutable:
            return made if made is None else args[0]
        return tree_map_only(Tensor, Held, made) if on_device else made

    def _look(self, packet: Any, tensors: list[Tensor]) -> None:
        if packet is aten._local_scalar_dense:
            self.waits["read"] += 1
        elif packet in _COUNTED_BY_NUMBERS or any(
            x.dtype == torch.bool for x in tensors[1:] if packet is aten.index
        ):
            self.waits["count"] += 1
        apart = [x for x in tensors if not isinstance(x, Held) and x.ndim]
        if apart and packet is aten.index:
            self.waits["send"] += 1
        elif apart:
            raise AssertionError(f"{packet}: tensors of the host and of the device")


@contextmanager
def device() -> Iterator[Device]:
    """The device, for the time of the block; pinned memory is any memory there."""
    with pytest.MonkeyPatch.context() as patched, Device() as made:
        patched.setattr(Tensor, "pin_memory", lambda self: self)
        yield made
