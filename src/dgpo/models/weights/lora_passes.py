"""How a LoRA takes part in a pass: merged, in the precision of its base, or not at all.

- Over a float32 base it is merged, ``W + scale B A``, and the layers themselves are off.
- Over a base in half precision it is computed in that precision, ``y = W x``, then
  ``y += B' (A' x)`` as one product that adds in float32 and rounds once. ``A' = round(A)`` and
  ``B' = round(scale B)`` are cast from the float32 weights, which are what is trained, for all
  layers together as a pass begins. ``x`` is in half precision already, so nothing casts it.
- Elsewhere (4 or 8 bits, a sharded float32 base) peft's own layers compute it in float32.

The reference has no LoRA. In eager mode its layers skip it, for all layers by one flag: this is
exact, and it costs nothing. A compiled pass would need a second graph for that, so there a tensor
chooses between ``y`` and the sum. It chooses and does not multiply: ``y + 0 (B' A' x)`` would be 0
where ``y`` is -0, and NaN where the product overflows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from dgpo.models.weights.lora import ADAPTER, base_of, can_merge, layers_in
from dgpo.models.weights.restoring import restoring

_NARROW = (torch.bfloat16, torch.float16)


class _Switch:
    """What the layers of a policy have in common.

    ``off`` skips the LoRA; where there is a ``gate``, it says so to passes without gradients.
    """

    off = False
    gate: Tensor | None = None


class _Switched:
    """A layer of peft that asks the switch of its policy; mixed in before peft's own class."""

    switch: _Switch
    narrow: torch.dtype | None
    """The precision of the LoRA's products; None for peft's own."""
    pair: tuple[Tensor, Tensor] | None = None
    """``A'`` and ``B'`` for the time of a pass; None to cast the layer's own."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``W x``, with the LoRA or without."""
        switch = self.switch
        if switch.off:
            return self.base_layer(x, *args, **kwargs)
        alone = not (args or kwargs or self.disable_adapters or self.merged)
        if not alone or x.dtype != self.narrow or self.active_adapters != [ADAPTER]:
            return super().forward(x, *args, **kwargs)  # pyright: ignore
        down, up = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        if self.pair is not None:
            a, b = self.pair
        else:
            a, b = down.weight.to(x.dtype), (up.weight * self.scaling[ADAPTER]).to(x.dtype)
        gate = None if torch.is_grad_enabled() else switch.gate
        if not isinstance(down, nn.Linear):
            made, more = self.base_layer(x), _convolved(up, _convolved(down, x, a), b)
            return made + more if gate is None else torch.where(gate, made + more, made)
        rows, flat = x.reshape(-1, x.shape[-1]), x.dim() in (2, 3) and x.is_contiguous()
        # torch takes such an input as rows itself. Of rows the base makes a tensor that is no view,
        # so that the sum can be written into it; what torch does not flatten it rounds otherwise
        made = self.base_layer(rows) if flat else self.base_layer(x).reshape(-1, len(b))
        low = nn.functional.linear(rows, a)
        if gate is not None:
            made = torch.where(gate, torch.addmm(made, low, b.t()), made)
        elif flat:
            made = made.addmm_(low, b.t())
        else:
            made = torch.addmm(made, low, b.t())
        return made.view(*x.shape[:-1], len(b))


def _convolved(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    return layer._conv_forward(x, weight, None)


@functools.cache
def _switched_class(kind: type) -> type:
    if issubclass(kind, _Switched):
        return kind
    return type(kind.__name__, (_Switched, kind), {"__module__": kind.__module__})


class _Cast(torch.autograd.Function):
    """Casts the weights of all layers, as one tensor; gradients reach the float32 weights.

    ``values`` are those of every ``A`` and then those of every ``B``, which are scaled.
    """

    @staticmethod
    def forward(ctx: Any, like: Tensor, scale: float, *values: Tensor) -> Any:
        ctx.scale = scale
        ctx.set_materialize_grads(False)  # a layer that was not asked gets no gradient
        wide = _scaled(values, len(values) // 2, scale, like.device)
        return _unflatten_dense_tensors(wide.to(like.dtype), values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        there = {place: one for place, one in enumerate(gradients) if one is not None}
        narrow, first = list(there.values()), sum(2 * place < len(gradients) for place in there)
        wide = _scaled(narrow, first, ctx.scale, narrow[0].device)
        found = dict(zip(there, _unflatten_dense_tensors(wide, narrow), strict=True))
        return None, None, *(found.get(place) for place in range(len(gradients)))


def _scaled(values: Sequence[Tensor], first: int, scale: float, device: torch.device) -> Tensor:
    """Return tensors as one of float32, of which all but the first so many are scaled."""
    made = _flatten_dense_tensors(values).to(device, torch.float32)
    made[sum(value.numel() for value in values[:first]) :].mul_(scale)
    return made


class LoraPasses:
    """``LoraPasses`` puts the weights of a LoRA in place for a pass, and takes them away.

    Args:
        layers: peft's own. They ask a switch from now on; until a method here turns it they answer
            as before, but for half precision.
        compiled: whether passes without gradients shall be one graph, with the LoRA and without.
    """

    def __init__(self, layers: Sequence[LoraLayer], compiled: bool = False) -> None:
        self.layers: list[Any] = list(layers)
        self.merges = can_merge(layers)
        """True where ``W + scale B A`` can be written without a loss that matters."""
        self.weights: list[nn.Parameter] = [
            half[layer.active_adapters[0]].weight
            for layer in self.layers
            for half in (layer.lora_A, layer.lora_B)
        ]
        """``A`` and ``B`` of every layer: what is trained, in float32."""
        self._switch = _Switch()
        for layer in self.layers:
            layer.__class__ = _switched_class(type(layer))
            dtype = base_of(layer).dtype
            layer.switch, layer.narrow = self._switch, dtype if dtype in _NARROW else None
        kinds = {layer.narrow for layer in self.layers}
        self.narrow = kinds.pop() if len(kinds) == 1 else None
        """The precision in which all layers compute the LoRA, if it is half precision."""
        if compiled and self.narrow is not None:
            device = base_of(self.layers[0]).device
            self._switch.gate = torch.ones((), dtype=torch.bool, device=device)

    @property
    def gated(self) -> bool:
        """Return whether one graph has the LoRA and leaves it out, as a tensor says."""
        return self._switch.gate is not None

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside the block the layers answer as if they had no LoRA."""
        switch = self._switch
        before = switch.off
        with restoring(lambda: setattr(switch, "off", before)):
            switch.off = True
            yield

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside the block, without gradients, the layers answer as if they had no LoRA, by the
        graph of the passes that have it where these are compiled."""
        gate = self._switch.gate
        if gate is None:
            with self.off():
                yield
            return

        def restore() -> None:
            gate.fill_(True)

        with self.cast(self.weights), restoring(restore):
            gate.fill_(False)
            yield

    @contextmanager
    def cast(self, values: Sequence[Tensor], gradients: bool = False) -> Iterator[None]:
        """Inside the block the LoRA is ``values``, cast to half precision.

        They are cast anew for each block: a cast that is kept would have to know of every way in
        which weights move.

        Args:
            values: in the order of :attr:`weights`, on any device.
            gradients: whether gradients reach ``values``. Backward may run after the block.
        """
        base, (scale,) = base_of(self.layers[0]), {one.scaling[ADAPTER] for one in self.layers}
        like = torch.empty((), dtype=self.narrow, device=base.device)
        # not by torch.no_grad, which a stop on its last line would leave on
        given = values if gradients else [value.detach() for value in values]
        made: Any = _Cast.apply(like, scale, *given[::2], *given[1::2])
        count = len(self.layers)
        pairs = list(zip(made[:count], made[count:], strict=True))
        # past nn.Module's __setattr__, which would look at every value
        before = [vars(layer).get("pair") for layer in self.layers]

        def hold(found: Sequence[Any]) -> None:
            for layer, pair in zip(self.layers, found, strict=True):
                vars(layer)["pair"] = pair

        with restoring(lambda: hold(before)):
            hold(pairs)
            yield

    @torch.no_grad()
    def merged(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Return the base weights of the layers, and their values with the LoRA written in."""
        bases = [base_of(layer) for layer in self.layers]
        return bases, [_sum(base, layer) for base, layer in zip(bases, self.layers, strict=True)]

    @contextmanager
    def blended(self) -> Iterator[None]:
        """Inside the block the base weights are ``W + scale B A``, as part of the autograd graph.

        For a batch of many tokens this is cheaper than the LoRA's own two products for every token:
        it costs one small product a layer, and ``A`` and ``B`` get their gradients from the
        gradient of the sum. Backward may run after the block.
        """
        holders = [layer.get_base_layer() for layer in self.layers]
        kept = [holder._parameters["weight"] for holder in holders]
        values = [_sum(weight, layer) for weight, layer in zip(kept, self.layers, strict=True)]

        def hold(weights: Sequence[Any]) -> None:
            # into the module's table: assigning to ``weight`` would refuse what is no parameter
            for holder, weight in zip(holders, weights, strict=True):
                holder._parameters["weight"] = weight

        with self.off(), restoring(lambda: hold(kept)):
            hold(values)
            yield


@torch.no_grad()
def rounded(denoisers: Mapping[str, nn.Module]) -> None:
    """Round every LoRA to the precision of its denoiser, as a pipeline does that loads it."""
    for layer in layers_in(denoisers):
        dtype = base_of(layer).dtype
        for weight in _own(layer):
            weight.copy_(weight.to(dtype))


@torch.no_grad()
def widened(denoisers: Mapping[str, nn.Module]) -> None:
    """Make every LoRA float32, its weights and its products, whatever was made of it."""
    for layer in layers_in(denoisers):
        vars(layer)["narrow"] = None
        for weight in _own(layer):
            weight.data = weight.data.float()


def _own(layer: LoraLayer) -> Iterator[nn.Parameter]:
    """Yield the weights of a layer's LoRA."""
    # by identity: the base weights are parameters of the layer, too
    base = {id(weight) for weight in layer.get_base_layer().parameters()}
    module: Any = layer
    yield from (weight for weight in module.parameters() if id(weight) not in base)


def _sum(base: Any, layer: Any) -> Tensor:
    """Return ``W + scale B A``, in the precision of ``W``."""
    return base + layer.get_delta_weight(layer.active_adapters[0]).to(base.dtype)
