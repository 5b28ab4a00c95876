"""Run equal blocks of a network once, where nothing has numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dgpo.models.pipeline.probes import replaced
from dgpo.planning.live import Live, Need

_call: Any = nn.Module.__call__


@contextmanager
def equal_blocks_once(live: Live) -> Iterator[None]:
    """Run equal blocks of networks once inside the block.

    Args:
        live: adds up what is made.
    """
    blocks = _Blocks(live)
    nn.Module.__call__ = lambda module, *args, **kwargs: blocks.call(module, args, kwargs)
    try:
        yield
    finally:
        nn.Module.__call__ = _call


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
    def forward(ctx: Any, block: _Block, live: Live, *tensors: Tensor) -> Any:
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

    def __init__(self, live: Live) -> None:
        self._live = live
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
        # a base weight with the LoRA written in reaches A and B by a graph of its own
        trained = [weight for weight in trained if not weight.is_leaf] or trained
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
