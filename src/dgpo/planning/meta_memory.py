"""Find out how much memory code needs at its worst moment, by running it without numbers.

Tensors on the meta device have sizes and no memory. They live as long as tensors with numbers do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as config_of_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import flop_registry

from dgpo.models.pipeline.probes import replaced

_config: Any = config_of_fx  # its type does not declare its attributes


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


class _Live(TorchDispatchMode):
    """Adds up the storages made inside the block, for as long as they live, and the products."""

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


class Unfilled(TorchFunctionMode):
    """Leaves new weights as they are: those without numbers cannot be filled, only asked to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        own = getattr(func, "__module__", None) == nn.init.__name__
        if own or func in (Tensor.uniform_, Tensor.normal_):
            return args[0] if args else named["tensor"]
        return func(*args, **named)


@dataclass(frozen=True)
class _Block:
    """What a block of a network has been seen to make and to need.

    Args:
        leaves: how each of its outputs is found among the inputs and what is new.
        form: how the outputs are put together.
        made: new tensors without memory that say how what is new looks.
        gradients: the tensors that get a gradient, None in the place of those that do not.
        forward: the need of its pass, with what is new.
        backward: the need of its backward pass, beside what is kept.
        kept: the bytes that the graph keeps of what is made inside.
        places: the tensors that the graph keeps, among those given and those new.
    """

    leaves: Sequence[Callable[[Sequence[Any]], Any]]
    form: Any
    made: Sequence[Tensor]
    gradients: Sequence[Tensor | None]
    forward: Need
    backward: Need
    kept: int
    places: Sequence[int]


class _Again(torch.autograd.Function):
    """A block that was seen before: it needs what that one needed, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, block: _Block, live: _Live, *tensors: Tensor) -> Any:
        live.add(block.forward)
        made = tuple(map(torch.empty_like, block.made))
        kept = torch.empty(block.kept, dtype=torch.uint8, device="meta")
        every = (*tensors, *made)
        ctx.save_for_backward(kept, *(every[place] for place in block.places))
        looks = zip(made, block.made, strict=True)
        ctx.mark_non_differentiable(*(one for one, look in looks if not look.requires_grad))
        ctx.set_materialize_grads(False)
        ctx.block, ctx.live = block, live
        return made

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        kept, live, looks = ctx.saved_tensors, ctx.live, ctx.block.gradients
        live.add(ctx.block.backward)  # with the gradients, while what was kept goes bit by bit
        made, _ = live.of(
            lambda: [None if look is None else torch.empty_like(look) for look in looks]
        )
        del kept
        return None, None, *made


class _Blocks:
    """Runs equal blocks of a network once.

    Each operation on the meta device takes as long as a hundred steps of Python, and a network is a
    list of equal blocks. Blocks of one class need the same memory where the shapes of their weights
    and inputs are equal and gradients are asked for in the same places. The first is run, forward
    and backward. It and the later ones return new tensors of the shapes that it made.
    """

    def __init__(self, live: _Live | None) -> None:
        self._live = live or _Live()
        self._known: set[int] = set()
        self._blocks: dict[int, tuple[Any, ...]] = {}
        self._seen: dict[Any, _Block] = {}

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if id(module) not in self._known:
            self._look_into(module)
        # a list may be changed by each block (Wan's autoencoder)
        lists = any(isinstance(a, list) for a in (*args, *kwargs.values()))
        if lists or id(module) not in self._blocks:
            return _call(module, *args, **kwargs)
        own = module.forward
        # hooks stay around it: text encoders collect by them what their blocks make
        with replaced(module, forward=lambda *a, **k: self._forward(module, own, (a, k))):
            return _call(module, *args, **kwargs)

    def _look_into(self, module: nn.Module) -> None:
        with torch._C.DisableTorchFunction():  # a mode would see each look at a shape
            for part in module.modules():
                self._known.add(id(part))
                for block in part if isinstance(part, nn.ModuleList) else ():
                    weights = (*block.named_parameters(), *block.named_buffers())
                    self._blocks[id(block)] = (
                        type(block), *((name, _signature(weight)) for name, weight in weights)
                    )  # fmt: skip

    def _forward(self, module: nn.Module, forward: Callable[..., Any], inputs: Any) -> Any:
        given, form = tree_flatten(inputs)
        graph = torch.is_grad_enabled()
        trained = [weight for weight in module.parameters() if weight.requires_grad and graph]
        key = (*self._blocks[id(module)], graph, str(form), *map(_signature, given))
        if key not in self._seen:
            self._seen[key] = self._learn(forward, given, form, trained)
        block = self._seen[key]
        tensors = [value for value in given if isinstance(value, Tensor)]
        made: Any = _Again.apply(block, self._live, *tensors, *trained)
        return tree_unflatten([leaf((*given, *made)) for leaf in block.leaves], block.form)

    def _learn(
        self, forward: Callable[..., Any], given: Sequence[Any], form: Any, trained: Sequence[Any]
    ) -> _Block:
        inside = [_apart(value) for value in given]
        tensors = [*(value for value in inside if isinstance(value, Tensor)), *trained]
        args, kwargs = tree_unflatten(inside, form)
        before, saved = self._live.now, set()

        def save(tensor: Tensor) -> Tensor:
            saved.add(_storage(tensor))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            outputs, ahead = self._live.of(lambda: forward(*args, **kwargs))
        leaves, made_form = tree_flatten(outputs)
        known = {id(value) for value in inside}
        new = {id(v): v for v in leaves if isinstance(v, Tensor) and id(v) not in known}
        every = [*inside, *new.values()]
        sizes = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in new.values()}
        kept = self._live.now - before - sum(sizes.values())
        ends = [tensor for tensor in new.values() if tensor.requires_grad]
        sources = [tensor for tensor in tensors if tensor.requires_grad]
        against = [torch.empty_like(tensor) for tensor in ends]
        found, back = ((), Need(0, 0))
        if ends and sources:
            found, back = self._live.of(
                lambda: torch.autograd.grad(ends, sources, against, allow_unused=True)
            )
        looks = {id(t): g for t, g in zip(sources, found, strict=bool(found))}
        return _Block(
            [_again(leaf, every) for leaf in leaves],
            made_form,
            [_look(tensor) for tensor in new.values()],
            [None if (g := looks.get(id(t))) is None else _look(g) for t in tensors],
            ahead,
            back,
            max(0, kept),
            [p for p, t in enumerate((*tensors, *new.values())) if _storage(t) in saved],
        )


_call: Any = nn.Module.__call__


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.requires_grad
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def _again(leaf: Any, every: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
    """Return what finds an output of a block among the inputs and new tensors of an equal one."""
    for place, value in enumerate(every):
        if leaf is value:
            return lambda others: others[place]
    return lambda _: leaf


def _apart(value: Any) -> Any:
    """Return an input of a block without the graph that it comes from."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _look(tensor: Tensor) -> Tensor:
    """Return a tensor of one number that looks like another one."""
    look = torch.empty(1, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    return look.requires_grad_(tensor.requires_grad)


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
