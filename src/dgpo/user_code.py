"""Code that is not ours runs apart: what it changes of the process is put back, and nothing mutable
is shared with it."""

from __future__ import annotations

import copy
import functools
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

from dgpo.errors import message
from dgpo.interrupts import Terminated

T = TypeVar("T")
_PASSED_ON = (Exception, KeyboardInterrupt, SystemExit, Terminated)
_ALIKE = (str, bytes, int, float, complex, bool, type(None))

_lock = threading.RLock()
_running: list[str] = []
"""Whose code runs now, in all threads."""
_before: list[Any] = []
"""What the process shared when the first of them began."""
_told: set[tuple[str, str]] = set()
"""Who has changed what."""


class _State(NamedTuple):
    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]


@contextmanager
def user_code(who: str) -> Iterator[None]:
    """Run code that is not ours inside the block, and put back what it changes.

    These are put back: the grad mode, inference mode, autocast, the default device and numpy's
    handling of errors, which each thread has for itself; torch's default dtype, its number of
    threads, its deterministic mode, its flags for cuDNN and for TF32, and the current folder, which
    the process shares; and in the main thread the handlers of Ctrl-C and SIGTERM. The first time
    that somebody changes one of them, a warning names both.

    The global random streams of Python, numpy and torch are left to the user's code: they go on
    from call to call, and a seed that it sets holds. It cannot reach our streams, because all that
    is drawn for a run comes from generators of its own, which the seed and the iteration make.

    What the process shares is different for other threads too, until the block ends. So a reward
    that has changed it once is not asked beside the sampling any more (:func:`disturbs`). A call
    that is given up because it hangs can still change it later.

    Args:
        who: what the warning calls the code, such as ``reward 'x'``.

    Raises:
        RuntimeError: the code raised something that neither is an ``Exception`` nor asks the
            program to end, such as ``asyncio.CancelledError``.
    """
    import torch

    grad, own_states, shared = torch.is_grad_enabled(), _of_thread(), _of_process()
    # the guard's end restores both modes, whatever was entered inside and never left
    with torch.inference_mode(False):
        torch.set_grad_enabled(grad)
        began = [state.read() for state in own_states]
        with _lock:
            if not _running:
                _before[:] = [state.read() for state in shared]
            _running.append(who)
        try:
            yield
        except _PASSED_ON:
            raise
        except BaseException as error:  # it would pass by all that handles failures
            said = f"{type(error).__name__}: {message(error)}"
            raise RuntimeError(said).with_traceback(error.__traceback__) from error
        finally:
            modes = {
                "the grad mode": torch.is_grad_enabled() != grad,
                "inference mode": torch.is_inference_mode_enabled(),
            }
            changed = [name for name, differs in modes.items() if differs]
            changed += _put_back(own_states, began)
            with _lock:
                # by the state of the first: another thread's code may have changed it before us
                of_all = _put_back(shared, _before)
                _running.remove(who)
                beside = list(_running) if of_all else []
            for one, what in ((who, changed + of_all), *((other, of_all) for other in beside)):
                _tell(one, what)


def _put_back(states: tuple[_State, ...], values: list[Any]) -> list[str]:
    changed = [
        (one, value) for one, value in zip(states, values, strict=True) if one.read() != value
    ]
    for state, value in changed:
        state.write(value)
    return [state.name for state, _ in changed]


def _tell(who: str, changed: list[str]) -> None:
    new = [name for name in changed if (who, name) not in _told]
    _told.update((who, name) for name in new)
    if new:
        # past the filters: "ignore" stands at the top of many a reward's file
        text = UserWarning(f"{who} changed {', '.join(new)}; put back")
        warnings.showwarning(text, UserWarning, __file__, 0)


def disturbs(who: str) -> bool:
    """Return whether this code has changed what the whole process shares."""
    return any((who, state.name) in _told for state in _of_process())


def own(value: T) -> T:
    """Return a copy for code that is not ours, deep enough that it can change nothing of ours.

    Pictures, tensors, arrays and containers are copied with all that is in them; what cannot be
    copied, such as an open file, is handed on as it is.

    >>> rows = [{"tag": ["a"]}]
    >>> own(rows)[0]["tag"].clear()
    >>> rows
    [{'tag': ['a']}]
    """
    from PIL import Image
    from torch import Tensor

    made: Any = value
    if isinstance(value, _ALIKE):
        return made
    if type(value) in (list, tuple):
        return type(value)(map(own, value))  # pyright: ignore
    if type(value) is dict:
        return {key: own(one) for key, one in value.items()}  # pyright: ignore
    if isinstance(value, Image.Image):
        return value.copy()  # pyright: ignore
    if isinstance(value, Tensor):
        return value.clone()  # pyright: ignore
    with suppress(Exception):
        made = copy.deepcopy(value)
    return made


@functools.cache
def _of_thread() -> tuple[_State, ...]:
    """What each thread has for itself, but for the modes that the guard restores."""
    import numpy as np
    import torch.utils._device

    def handlers() -> Any:
        if threading.current_thread() is threading.main_thread():
            return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return None

    def handle(before: Any) -> None:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)  # None: set by C code

    kinds = ("cpu", "cuda")

    def autocast() -> Any:
        modes = [
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds
        ]
        return [*modes, torch.is_autocast_cache_enabled()]

    def cast(before: Any) -> None:
        for kind, (enabled, dtype) in zip(kinds, before, strict=False):
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(before[-1])

    # of set_default_device, and of a device or another mode that was entered and never left
    held, modes = torch._GLOBAL_DEVICE_CONTEXT, torch.overrides
    device: Any = torch.utils._device

    def devices() -> list[Any]:
        context = getattr(held, "device_context", None)
        return [context, device.CURRENT_DEVICE, *modes._get_current_function_mode_stack()]

    def place(before: list[Any]) -> None:
        for _ in modes._get_current_function_mode_stack():
            modes._pop_mode()
        held.device_context, device.CURRENT_DEVICE, *stack = before
        for mode in stack:
            modes._push_mode(mode)

    return (
        _State("autocast", autocast, cast),
        _State("the default device", devices, place),
        _State("numpy's handling of errors", np.geterr, lambda before: np.seterr(**before)),
        _State("the handlers of Ctrl-C and SIGTERM", handlers, handle),
    )


@functools.cache
def _of_process() -> tuple[_State, ...]:
    """What all threads share."""
    import torch

    cudnn = torch.backends.cudnn

    def folder() -> str | None:
        with suppress(OSError):  # it was deleted
            return os.getcwd()
        return None

    def enter(before: str | None) -> None:
        with suppress(OSError):
            os.chdir(before or os.curdir)

    def deterministic() -> tuple[bool, bool]:
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.are_deterministic_algorithms_enabled(), warns

    def determine(before: tuple[bool, bool]) -> None:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])

    def flags() -> list[bool]:
        return [getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")]

    def flag(before: list[bool]) -> None:
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = before

    return (
        _State("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
        _State("the number of threads", torch.get_num_threads, torch.set_num_threads),
        _State("the deterministic mode", deterministic, determine),
        _State("the flags of cuDNN", flags, flag),
        _State("the precision of float32 (TF32)", _precisions, _set_precisions),
        _State("the current folder", folder, enter),
    )


def _precisions() -> list[Any]:
    """The two interfaces of torch to one setting; the older raises where the newer was used."""
    import torch

    found: list[Any] = [None, None]
    with suppress(RuntimeError):
        found[0] = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        found[1] = torch.backends.cudnn.allow_tf32
    return [*found, *(part.fp32_precision for part in _parts())]


def _set_precisions(before: list[Any]) -> None:
    import torch

    if before[0] is not None:
        torch.set_float32_matmul_precision(before[0])
    if before[1] is not None:
        torch.backends.cudnn.allow_tf32 = before[1]
    for part, value in zip(_parts(), before[2:], strict=True):
        part.fp32_precision = value


def _parts() -> list[Any]:
    """Where torch 2.9 and later keep the setting."""
    from torch import backends

    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    parts: list[Any] = [backends, backends.cuda.matmul, cudnn, mkldnn]
    for of in (cudnn, mkldnn):
        parts += [getattr(of, name, None) for name in ("conv", "rnn", "matmul")]
    return [part for part in parts if getattr(part, "fp32_precision", None) is not None]
