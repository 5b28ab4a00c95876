"""FSDP2: the weights of a denoiser are spread over the processes, in place.

``fully_shard`` leaves the module in its pipeline. Its parameters become pieces, and each block
gathers its weights for its own pass. What is attached after sharding, such as a LoRA, stays whole
in every process. :mod:`dgpo.distributed.lockstep` says what follows for the passes.
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
    """Shard denoisers in place, block by block, and move them to the device. Collective.

    The backward pass itself sums the gradients of sharded parameters over the processes.

    Args:
        denoisers: by name, on any device; a whole one need not fit on ``device``.
        processes: those of the run.
        device: where the pieces live.

    Raises:
        UserError: there is only one process.
    """
    if processes.single:
        raise UserError(
            "train.sharding = 'fsdp2' spreads the weights over several processes, and this is one: "
            "start it by torchrun --nproc-per-node N -m dgpo train ..., or use train.sharding=none"
        )
    mesh = init_device_mesh(device.type, (processes.size,))
    for name, denoiser in denoisers.items():
        titles = {module: title for title, module in denoiser.named_modules()}
        for module in [*blocks_of(denoiser), denoiser]:
            # the root lets go of its weights too: gathered in a rollout, they would be stale after
            # an optimiser step
            sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
            sharded.set_gradient_divide_factor(1.0)  # a sum, as micro-batches are summed
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other, in float32
            if processes.watch is not None:
                _report(module, ".".join(filter(None, (name, titles[module]))), processes.watch)


def sum_in_backward(denoisers: Iterable[nn.Module], now: bool) -> None:
    """Say whether the next backward pass sums the gradients of sharded weights over the processes.

    Args:
        denoisers: those that are trained.
        now: True to sum its gradients and all that passes before it have left; False to leave its
            own gradients, of all weights, in each process.
    """
    for denoiser in denoisers:
        if isinstance(denoiser, FSDPModule):
            denoiser.set_requires_gradient_sync(now)


def _report(module: nn.Module, name: str, watch: Watch) -> None:
    """Tell the watch of every pass through a sharded module, before it has to wait for others.

    A forward pass waits for weights; a backward pass waits for weights and for sums of gradients.
    """

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
    # after the sharding's own hook: its tensors are the ones that lead to its sum of gradients
    module.register_forward_pre_hook(entered, with_kwargs=True)
    module.register_forward_hook(left)


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """Return the modules that a denoiser repeats: the entries of its outermost lists."""
    found: list[nn.Module] = []
    for child in denoiser.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks_of(child)
    return [module for module in found if any(True for _ in module.parameters())]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process has a piece of the tensor only."""
    return isinstance(tensor, DTensor)


def any_sharded(modules: Iterable[nn.Module]) -> bool:
    """Return whether any weight is sharded; then all processes must make the same passes."""
    return any(is_sharded(weight) for module in modules for weight in module.parameters())


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return the piece of this process; all of a tensor that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor. Collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def like(tensor: Tensor, value: Tensor) -> Tensor:
    """Return ``value``, which every process has as a whole, sharded as ``tensor`` is."""
    if not isinstance(tensor, DTensor):
        return value
    value = value.to(tensor.device)
    # src_data_rank=None: every process cuts its own copy, and nothing is sent
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


@torch.no_grad()
def put(tensor: Tensor, value: Tensor) -> None:
    """Write a whole ``value`` into ``tensor``, which may hold a piece of it."""
    local(tensor).copy_(local(like(tensor, value)))


def plain_class(denoiser: nn.Module) -> type[Any]:
    """Return the class that a denoiser had before it was sharded."""
    kind = type(denoiser)
    if not isinstance(denoiser, FSDPModule):
        return kind
    return next(base for base in kind.__mro__[1:] if not issubclass(base, FSDPModule))
