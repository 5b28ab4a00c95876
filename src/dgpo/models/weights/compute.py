"""How a denoiser computes: compiled, with which attention, and with which shortcuts of a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dgpo.distributed.sharding import blocks_of
from dgpo.errors import UserError
from dgpo.registry import nearest

Compile = Literal["off", "blocks", "full"]
BACKEND = "inductor"
"""What torch.compile compiles with."""
_MOST_GRAPHS = 64
_NATIVE = {
    "native": None,
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
"""The kernels of torch's own attention, as diffusers calls them."""
_OF_A_GPU = ("_native_cudnn", "_native_efficient")
_changed = ExitStack()
"""Puts back what the last settings changed of the process."""


class ComputeSettings(Protocol):
    """``ComputeSettings`` are what a recipe says about how the denoiser computes."""

    compile: Compile
    """What is compiled: each of its blocks, or the whole of it, or nothing."""
    attention: str | None
    """The kernel of its attention, by diffusers' name."""
    tf32: bool | None
    """Float32 products may round their inputs to TF32, or not; None leaves it to torch."""
    cudnn_benchmark: bool | None
    """cuDNN tries its algorithms for every new shape, or not; None leaves it to torch."""


def set_up(denoisers: Mapping[str, nn.Module], settings: ComputeSettings) -> None:
    """Let denoisers compute as the settings say.

    What is said for the whole process (TF32, cuDNN, torch's own attention) lasts until the next
    call, which first puts it back.

    Raises:
        UserError: this machine, or a denoiser, cannot do it.
    """
    _changed.close()
    _tf32(settings.tf32)
    _cudnn_benchmark(settings.cudnn_benchmark)
    if settings.attention is not None:
        _attention(settings.attention, denoisers)
    compile_denoisers(denoisers, settings.compile)


def compile_denoisers(
    denoisers: Mapping[str, nn.Module], how: Compile, key: str = "compute.compile"
) -> None:
    """Compile denoisers in place. Each new shape is compiled in the first pass that has it.

    Args:
        denoisers: by name.
        how: ``blocks``: the modules that a denoiser repeats, whose graph is compiled once for all
            that are alike; ``full``: the whole of each; ``off``: nothing.
        key: the setting's name, for the errors.

    Raises:
        UserError: there is no compiler, or a denoiser repeats nothing.
    """
    if how == "off":
        return
    if (missing := missing_compiler(denoisers)) and BACKEND == "inductor":
        raise UserError(f"{key} = {how!r}: {missing}; use off")
    # kinds of blocks, with gradients and without, and batches of several sizes
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _MOST_GRAPHS)
    # rounded where eager passes round: else a pass with gradients and one without would differ, and
    # with them equal policies
    options = {"emulate_precision_casts": True} if BACKEND == "inductor" else None
    compiler: Any = {"backend": BACKEND, "options": options}
    for name, denoiser in denoisers.items():
        if how == "full":
            # not the module's own ``compile``, which would trace the hooks of who counts passes
            whole: Any = torch.compile(denoiser.forward, **compiler)
            denoiser.forward = whole
            continue
        blocks = repeated_blocks(denoiser)
        if not blocks:
            raise UserError(
                f"{key} = 'blocks': {name} ({type(denoiser).__name__}) repeats no "
                "blocks; use full, or off"
            )
        for block in blocks:
            block.compile(**compiler)


def is_compiled(denoisers: Mapping[str, nn.Module]) -> bool:
    """Return whether a denoiser, or a part of one, is compiled."""
    modules = (module for denoiser in denoisers.values() for module in denoiser.modules())
    return any(
        module._compiled_call_impl is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in modules
    )


def missing_compiler(denoisers: Mapping[str, nn.Module]) -> str | None:
    """Return what torch lacks on this machine to compile for the denoisers' device."""
    if any(p.device.type == "cuda" for d in denoisers.values() for p in d.parameters()):
        from torch.utils._triton import has_triton

        return None if has_triton() else "torch compiles for a GPU by Triton, which is not here"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch compiles for a CPU by a C++ compiler (g++, or what CXX names), and finds none"
    return None


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """Return the blocks that diffusers calls repeated; of a denoiser for which it names none, the
    entries of its outermost lists."""
    names = getattr(denoiser, "_repeated_blocks", None)
    if not names:
        return blocks_of(denoiser)
    return [module for module in denoiser.modules() if type(module).__name__ in names]


def _tf32(value: bool | None) -> None:
    if value and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)):
        raise UserError(
            "compute.tf32 = true: TF32 is a format of NVIDIA GPUs from Ampere (8.0) on, and there "
            "is none here; use null"
        )
    _change(torch.backends.cuda.matmul, "allow_tf32", value)
    _change(torch.backends.cudnn, "allow_tf32", value)


def _cudnn_benchmark(value: bool | None) -> None:
    if value and not torch.backends.cudnn.is_available():
        raise UserError("compute.cudnn_benchmark = true: there is no cuDNN here; use null")
    _change(torch.backends.cudnn, "benchmark", value)


def _change(owner: Any, name: str, value: bool | None) -> None:
    if value is not None:
        _changed.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def _attention(name: str, denoisers: Mapping[str, nn.Module]) -> None:
    """Choose the kernel of every attention of the denoisers."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    registry: Any = _AttentionBackendRegistry
    key = f"compute.attention = {name!r}"
    known = [one.value for one in AttentionBackendName]
    if name not in known:
        raise UserError(
            f"{key}: diffusers has no such backend{nearest(name, known)}; use one of "
            f"{', '.join(known)}, or null"
        )
    if name in _OF_A_GPU and not torch.cuda.is_available():
        raise UserError(f"{key}: it is a kernel of NVIDIA GPUs, and there is none here; use null")
    for part, denoiser in denoisers.items():
        if _dispatches(denoiser):
            chosen, choose = registry._active_backend, cast(Any, denoiser).set_attention_backend
            try:
                choose(name)
            except Exception as error:  # a missing package, or a kernel that cannot be fetched
                said = str(error).partition("\n")[0].rstrip(".")
                raise UserError(f"{key}: {said}; or use null") from error
            finally:  # it chooses for all other models of the process, too
                registry.set_active_backend(chosen)
        elif name in _NATIVE:
            if (first := _NATIVE[name]) is not None:
                others = [kernel for kernel in _NATIVE.values() if kernel not in (None, first)]
                _changed.enter_context(sdpa_kernel([first, *others], set_priority=True))
        else:
            raise UserError(
                f"{key}: {part} ({type(denoiser).__name__}) calls torch's own attention; use "
                f"{', '.join(_NATIVE)} or null"
            )


def _dispatches(denoiser: nn.Module) -> bool:
    """Return whether diffusers chooses the attention of this denoiser by a backend's name."""
    parts = (getattr(module, "processor", None) for module in denoiser.modules())
    return any(hasattr(part, "_attention_backend") for part in parts)
