"""FSDP2: the weights of a denoiser spread over the processes, in place.

``fully_shard`` leaves the module where it is, under its pipeline: its parameters become pieces, and
each block gathers its weights for the time of its own pass. What is attached after sharding, such
as a LoRA, stays whole in every process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dgpo.distributed.processes import Processes
from dgpo.distributed.watch import Watch
from dgpo.errors import UserError


def shard(denoisers: Mapping[str, nn.Module], processes: Processes, device: torch.device) -> None:
    """Shard denoisers in place, block by block, and bring them to the device.

    Gradients of sharded parameters are summed over the processes by the backward pass itself.

    Args:
        denoisers: by name, on any device; a whole one need not fit ``device``.
        processes: all of which do the same. Collective.
        device: where the pieces live.

    Raises:
        UserError: there is one process only.
    """
    if processes.single:
        raise UserError(
            "train.sharding = 'fsdp2' spreads the weights over several processes, and this is one: "
            "start it by torchrun --nproc-per-node N -m dgpo train ..., or use train.sharding=none"
        )
    mesh = init_device_mesh(device.type, (processes.size,))
    for name, denoiser in denoisers.items():
        titles = {module: title for title, module in denoiser.named_modules()}
        for module in [*_blocks(denoiser), denoiser]:
            # also of the root: its weights, gathered for a rollout, would be stale after a step
            sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
            sharded.set_gradient_divide_factor(1.0)  # a sum, as micro-batches are summed
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other, in float32
            if processes.watch is not None:
                _report(module, ".".join(filter(None, (name, titles[module]))), processes.watch)


def sum_in_backward(denoisers: Iterable[nn.Module], now: bool) -> None:
    """Whether the next backward pass sums the gradients of sharded weights over the processes, with
    those that the passes before it have left; else it leaves its own, of all weights."""
    for denoiser in denoisers:
        if isinstance(denoiser, FSDPModule):
            denoiser.set_requires_gradient_sync(now)


def _report(module: nn.Module, name: str, watch: Watch) -> None:
    """Tell the watch of every pass through a sharded module, before its weights are gathered, and
    of that of the gradients, before weights are gathered and before gradients are summed."""

    def forwards(*_: object) -> None:
        watch.passes(f"the forward pass of {name}, in pieces (train.sharding)")

    def backwards(*_: object) -> None:
        watch.passes(f"the backward pass of {name}, in pieces (train.sharding)")

    def follow(values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(backwards)

    def entered(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        follow([*inputs, *named.values()])

    def left(module: nn.Module, inputs: object, output: Any) -> None:
        follow(output if isinstance(output, tuple) else [output])

    module.register_forward_pre_hook(forwards, prepend=True)
    # after the sharding's own hook, whose tensors they are that lead to its sum of gradients
    module.register_forward_pre_hook(entered, with_kwargs=True)
    module.register_forward_hook(left)


def _blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The modules that a denoiser repeats: the entries of its outermost lists."""
    found: list[nn.Module] = []
    for child in denoiser.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _blocks(child)
    return [module for module in found if any(True for _ in module.parameters())]


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def any_sharded(modules: Iterable[nn.Module]) -> bool:
    """Whether weights are spread over processes, which must then all make the same passes."""
    return any(is_sharded(weight) for module in modules for weight in module.parameters())


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The piece of this process; a tensor that is not sharded as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def like(tensor: Tensor, value: Tensor) -> Tensor:
    """A whole ``value``, which every process has, sharded as ``tensor`` is."""
    if not isinstance(tensor, DTensor):
        return value
    value = value.to(tensor.device)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


@torch.no_grad()
def put(tensor: Tensor, value: Tensor) -> None:
    """``tensor`` gets a whole ``value``, of which it may hold a piece."""
    local(tensor).copy_(local(like(tensor, value)))


def plain_class(denoiser: nn.Module) -> type[Any]:
    """The class of a denoiser before it was sharded."""
    kind = type(denoiser)
    if not isinstance(denoiser, FSDPModule):
        return kind
    return next(base for base in kind.__mro__[1:] if not issubclass(base, FSDPModule))
