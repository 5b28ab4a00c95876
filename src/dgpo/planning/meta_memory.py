"""Find out how much memory code needs at its worst moment, by running it without numbers.

Tensors on the meta device have sizes and no memory. They live as long as tensors with numbers do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as config_of_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_config: Any = config_of_fx  # its type does not declare its attributes


class _Live(TorchDispatchMode):
    """Adds up the storages made inside the block, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._meet, made)
        return made

    def _meet(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.is_meta and key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, storage.nbytes())
        return tensor

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Fused(torch.autograd.Function):
    """Attention as the fused kernels compute it: they never hold the matrix of weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        made = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, made, sums)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Make every call of torch's attention a fused one inside the block.

    A function mode would not reach the blocks that checkpointing runs again in the backward pass,
    so torch's own function is replaced.
    """
    own = nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _Fused.apply(query, key, value)

    nn.functional.scaled_dot_product_attention = attention  # pyright: ignore
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = own  # pyright: ignore


class Numbers(TorchFunctionMode):
    """Lets meta tensors answer when code asks for numbers: masks are full, everything else is 1.

    Some pipelines look at the lengths of prompts, or decide which of two experts is next, and would
    fail otherwise.
    """

    _ASKED: ClassVar[dict[Any, Any]] = {
        Tensor.__bool__: True,
        Tensor.__float__: 1.0,
        Tensor.__int__: 1,
        Tensor.item: 1,
    }

    def __enter__(self) -> Any:
        # indexing by a boolean mask takes everything
        self._full_masks: Any = _config.patch(meta_nonzero_assume_all_nonzero=True)
        self._full_masks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._full_masks.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        tensor = args[0] if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        if tensor is None:
            return func(*args, **named)
        if func in self._ASKED:
            return self._ASKED[func]
        if func is Tensor.tolist and tensor.ndim == 1:
            return [getattr(tensor, _LENGTH, 1)] * len(tensor)
        made = func(*args, **named)
        if func in (Tensor.sum, torch.sum) and isinstance(named.get("dim"), int):
            setattr(made, _LENGTH, tensor.shape[named["dim"]])  # the length of a full mask
        return made


_LENGTH = "_dgpo_length"


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the largest number of bytes that the tensors made by ``call`` hold at one time.

    Args:
        call: a function that works on meta tensors only.
    """
    with Numbers(), _fused_attention(), _Live() as live:
        made = call()
        del made
    return live.peak
