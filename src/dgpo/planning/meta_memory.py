"""Find out how much memory code needs at its worst moment, by running it without numbers.

Tensors on the meta device have sizes and no memory. They live as long as tensors with numbers do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as config_of_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.flop_counter import flop_registry

_config: Any = config_of_fx  # its type does not declare its attributes


class _Live(TorchDispatchMode):
    """Adds up the storages made inside the block, for as long as they live, and the products."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # an operation may return a view of a tensor that was there before, such as a weight
        tree_map_only(Tensor, self._outside, (args, kwargs))
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._meet, made)
        counted = flop_registry.get(func.overloadpacket)
        if counted is not None:
            self.flops += counted(*args, **(kwargs or {}), out_val=made)
        return made

    def _outside(self, tensor: Tensor) -> Tensor:
        return self._meet(tensor, counts=False)

    def _meet(self, tensor: Tensor, counts: bool = True) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.is_meta and key not in self._known:
            size = storage.nbytes() if counts else 0
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)
        return tensor

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Fused(torch.autograd.Function):
    """Attention as the fused kernels compute it: they never hold the matrix of weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, live: _Live) -> Tensor:
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
def _fused_attention(live: _Live) -> Iterator[None]:
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


class _Blocks:
    """Runs equal blocks of a network once, where no gradient is asked for.

    Each operation on the meta device takes as long as a hundred steps of Python, and a network is a
    list of equal blocks. Blocks of one class need the same memory where the shapes of their weights
    and inputs are equal. The later ones return new tensors of the shapes that the first one made.
    """

    def __init__(self, live: _Live | None) -> None:
        self._live = live or _Live()
        self._known: set[int] = set()
        self._blocks: dict[int, tuple[Any, ...]] = {}
        self._seen: dict[Any, tuple[list[Any], Any, int, int]] = {}

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if id(module) not in self._known:
            self._look_into(module)
        # a hook wants to see every block, and a list may be changed by each (Wan's autoencoder)
        whole = module._forward_hooks or any(isinstance(a, list) for a in (*args, *kwargs.values()))
        if whole or torch.is_grad_enabled() or id(module) not in self._blocks:
            return _call(module, *args, **kwargs)
        given, form = tree_flatten((args, kwargs))
        key = (*self._blocks[id(module)], str(form), *map(_signature, given))
        live = self._live
        if key in self._seen:
            leaves, form, extra, flops = self._seen[key]
            live.peak = max(live.peak, live.now + extra)
            live.flops += flops
            return tree_unflatten([leaf(given) for leaf in leaves], form)
        before, peak, flops = live.now, live.peak, live.flops
        live.peak = before
        made = _call(module, *args, **kwargs)
        leaves, form = tree_flatten(made)
        again = [_again(leaf, given) for leaf in leaves]
        self._seen[key] = (again, form, live.peak - before, live.flops - flops)
        live.peak = max(live.peak, peak)
        return made

    def _look_into(self, module: nn.Module) -> None:
        for part in module.modules():
            self._known.add(id(part))
            for block in part if isinstance(part, nn.ModuleList) else ():
                weights = (*block.named_parameters(), *block.named_buffers())
                self._blocks[id(block)] = (
                    type(block), *((name, _signature(weight)) for name, weight in weights)
                )  # fmt: skip


_call: Any = nn.Module.__call__


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def _again(leaf: Any, given: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
    """Return what makes an output of a block once more from the inputs of an equal block."""
    for place, value in enumerate(given):
        if leaf is value:
            return lambda inputs: inputs[place]
    if not isinstance(leaf, Tensor):
        return lambda _: leaf
    shape, dtype, device = leaf.shape, leaf.dtype, leaf.device
    return lambda _: torch.empty(shape, dtype=dtype, device=device)


@contextmanager
def without_numbers(live: _Live | None = None) -> Iterator[None]:
    """Run code on meta tensors inside the block: it gets answers where it asks for numbers, and
    equal blocks of a network run once.

    Args:
        live: adds up what is made; None where nobody counts.
    """
    blocks = _Blocks(live)
    nn.Module.__call__ = lambda module, *args, **kwargs: blocks.call(module, args, kwargs)
    try:
        with Numbers():
            yield
    finally:
        nn.Module.__call__ = _call


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


def needs(call: Callable[[], Any]) -> Need:
    """Return what a call needs.

    Args:
        call: a function that works on meta tensors only.
    """
    live = _Live()
    with without_numbers(live), _fused_attention(live), live:
        made = call()
        del made
    return Need(live.peak, live.flops)
