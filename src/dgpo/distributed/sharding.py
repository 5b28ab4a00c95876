"""FSDP2: the weights of a denoiser are spread over the processes, in place.

``fully_shard`` leaves the module in its pipeline. Its parameters become pieces, and each block
gathers its weights for its own pass. What is attached after sharding, such as a LoRA, stays whole
in every process. :mod:`dgpo.distributed.lockstep` says what follows for the passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from dgpo.distributed.processes import Processes
from dgpo.distributed.watch import Watch
from dgpo.errors import UserError


class ShardSettings(Protocol):
    """``ShardSettings`` are what a recipe says about weights in pieces."""

    sharding_size: int | None
    """The number of processes that share one copy of the weights; None for all."""
    sharding_offload: bool
    """True where the pieces lie on the CPU."""
    reshard: bool
    """True where a block lets go of its gathered weights after its pass."""


def shard(
    denoisers: Mapping[str, nn.Module],
    processes: Processes,
    device: torch.device,
    settings: ShardSettings,
) -> None:
    """Shard denoisers in place, block by block, and move them to the device. Collective.

    The backward pass itself sums the gradients of sharded parameters over the processes, in float32
    or wider.

    Args:
        denoisers: by name, on any device; a whole one need not fit on ``device``.
        processes: those of the run.
        device: where passes compute.
        settings: how they are sharded.

    Raises:
        UserError: there is only one process, the processes cannot be divided as the settings say,
            or weights that are trained have two precisions.
    """
    if processes.single:
        raise UserError(
            "train.sharding = 'fsdp2' spreads the weights over several processes, and this is one: "
            "start it by torchrun --nproc-per-node N -m dgpo train ..., or use train.sharding=none"
        )
    mesh = _mesh(processes.size, settings.sharding_size, device)
    offload = OffloadPolicy()
    if settings.sharding_offload:
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for name, denoiser in denoisers.items():
        wide = MixedPrecisionPolicy(reduce_dtype=sums_in(name, denoiser))
        titles = {module: title for title, module in denoiser.named_modules()}
        for module in [*blocks_of(denoiser), denoiser]:
            # the root lets go of its weights too: gathered in a rollout, they would be stale after
            # an optimiser step
            sharded = fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=settings.reshard,
                mp_policy=wide,
                offload_policy=offload,
            )
            sharded.set_reshard_after_backward(settings.reshard)
            sharded.set_gradient_divide_factor(1.0)  # a sum, as micro-batches are summed
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other, in float32
            if processes.watch is not None:
                _report(module, ".".join(filter(None, (name, titles[module]))), processes.watch)


def _mesh(processes: int, size: int | None, device: torch.device) -> DeviceMesh:
    """Return the processes in a row, or in rows of ``size`` which have a copy of the weights each
    (HSDP)."""
    pieces = pieces_of(processes, size)
    if pieces == processes:
        return init_device_mesh(device.type, (processes,))
    names = ("replicate", "shard")
    return init_device_mesh(device.type, (processes // pieces, pieces), mesh_dim_names=names)


def pieces_of(processes: int, size: int | None) -> int:
    """Return the number of pieces of a weight.

    Raises:
        UserError: ``size``, which is ``train.sharding_size``, does not divide the processes.
    """
    if size is not None and processes % size:
        raise UserError(
            f"train.sharding_size = {size}: {processes} processes cannot be divided into groups of "
            f"{size}; use a divisor of their number, or null for all of them"
        )
    return size or processes


def sums_in(name: str, denoiser: nn.Module) -> torch.dtype | None:
    """Return the precision in which gradients are summed; None for that of the weights."""
    kinds = {p.dtype for p in denoiser.parameters() if p.requires_grad}
    if len(kinds) > 1:
        raise UserError(
            f"train.sharding = 'fsdp2' with lora: null: the weights of {name} are "
            f"{' and '.join(sorted(map(str, kinds)))}, and FSDP2 sums gradients of one precision; "
            "use precision: float32, a LoRA, or train.sharding: none"
        )
    return torch.float32 if any(kind.itemsize < 4 for kind in kinds) else None


def let_go(denoisers: Iterable[nn.Module]) -> None:
    """Let denoisers go of gathered weights that ``train.reshard: false`` has left in place."""
    for denoiser in denoisers:
        for module in denoiser.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


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
    """Return whether any module is sharded; then all processes must make the same passes."""
    # not by the weights, which are whole while they are gathered
    return any(isinstance(part, FSDPModule) for module in modules for part in module.modules())


def device_of(tensor: Tensor) -> torch.device:
    """Return the device that computes with the tensor; its pieces may lie on the CPU."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh.device_type == "cpu":
        return tensor.device
    return torch.device(tensor.device_mesh.device_type, torch.accelerator.current_device_index())


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
