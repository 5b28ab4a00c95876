"""Find out how much memory code needs at its worst moment, by running it without numbers.

Tensors on the meta device have sizes and no memory. They live as long as tensors with numbers do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as config_of_fx
from torch.overrides import TorchFunctionMode

from dgpo.planning.equal_blocks import equal_blocks_once
from dgpo.planning.live import Live, Need

_config: Any = config_of_fx  # its type does not declare its attributes


class _Fused(torch.autograd.Function):
    """Attention as the fused kernels compute it: they never hold the matrix of weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, live: Live) -> Tensor:
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        made = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, made, sums)
        ctx.live = live
        live.flops += _attention_flops(query, key, value)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, _, _ = ctx.saved_tensors
        # five products instead of two: the weights are made again
        ctx.live.flops += int(2.5 * _attention_flops(query, key, value))
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    pairs = query.shape[:-1].numel() * key.shape[-2]
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


@contextmanager
def _fused_attention(live: Live) -> Iterator[None]:
    """Make every call of torch's attention a fused one inside the block.

    A function mode would not reach the blocks that checkpointing runs again in the backward pass,
    so torch's own function is replaced.
    """
    own = nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _Fused.apply(query, key, value, live)

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


class Unfilled(TorchFunctionMode):
    """Leaves new weights as they are: those without numbers cannot be filled, only asked to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        own = getattr(func, "__module__", None) == nn.init.__name__
        if own or func in (Tensor.uniform_, Tensor.normal_):
            return args[0] if args else named["tensor"]
        return func(*args, **named)


@contextmanager
def without_numbers(live: Live | None = None) -> Iterator[None]:
    """Run code on meta tensors inside the block: it gets answers where it asks for numbers, and
    equal blocks of a network run once.

    Args:
        live: adds up what is made; None where nobody counts.
    """
    with equal_blocks_once(live or Live()), Numbers():
        yield


def needs(call: Callable[[], Any]) -> Need:
    """Return what a call needs.

    Args:
        call: a function that works on meta tensors only.
    """
    live = Live()
    with without_numbers(live), _fused_attention(live), live:
        made = call()
        del made
    return Need(live.peak, live.flops)
