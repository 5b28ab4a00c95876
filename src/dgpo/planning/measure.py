"""Measure the passes of a policy where it is: milliseconds, share of the peak, memory, waits."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from dgpo.errors import told
from dgpo.models.pipeline.probes import replaced
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.policy import Policy
from dgpo.planning.machine import GPUS

GUIDANCE = 4.5
"""The scale of the rollouts that are measured; each other one than 1 costs the same."""
STEPS = 4
"""The steps of the rollouts that are measured."""
FULL = "out of memory"
"""The error of a pass that does not fit the memory."""
_SYNCHRONIZES = "synchronizing CUDA operation"
_ATEN: Any = torch.ops.aten
_ON_THE_CPU: Any = {  # torch's own table has the attention of GPUs alone
    _ATEN._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v)
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda made, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(made, q, k, v)
    ),
}


@dataclass(frozen=True)
class Measured:
    """A ``Measured`` pass of some rows.

    Args:
        name: the pass, as :meth:`Passes.of` calls it.
        rows: the number of its samples.
        ms: the milliseconds until the device is done.
        host_ms: the milliseconds until the host has launched everything.
        tflop: the operations of products, convolutions and attention, in 10^12.
        mfu: the share of the GPU's peak; None where the peak is not known.
        peak_gb: the largest memory that the process holds on the GPU; None on the CPU.
        waits: how often the host waits within the pass, by file and line.
        error: why there are no figures, such as too little memory.
    """

    name: str
    rows: int
    ms: float = 0.0
    host_ms: float = 0.0
    tflop: float = 0.0
    mfu: float | None = None
    peak_gb: float | None = None
    waits: dict[str, int] | None = None
    error: str | None = None


class Passes:
    """``Passes`` are the passes that an iteration consists of, with random samples.

    Args:
        policy: the policy, with its LoRA.
        cond: the conditioning of one row, with that of the negative prompt.
    """

    def __init__(self, policy: Policy, cond: Conditioning) -> None:
        self.policy, self._cond = policy, cond
        self._model = model = policy.model
        self._guidance = GUIDANCE if model.has_guidance(cond) else 1.0
        self._decoded: tuple[Any, Any] | None = None
        self._flops: dict[tuple[str, int], float] = {}
        vae = getattr(model.pipe, "vae", None)
        with ExitStack() as patches:
            if isinstance(vae, nn.Module) and callable(decode := getattr(vae, "decode", None)):
                patches.enter_context(replaced(vae, decode=self._noting(decode)))
            made = self._rollout(cond, decode=True)
        self._x0, self._level = made.x0, made.levels[len(made.levels) // 2]

    def _noting(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self._decoded = self._decoded or (args, kwargs)
            return decode(*args, **kwargs)

        return noted

    def of(self, rows: int) -> dict[str, Callable[[], Any]]:
        """Return what makes each pass of some rows, by the name of the pass."""
        policy, level = self.policy, self._level
        cond = self._cond.rows(torch.zeros(rows, dtype=torch.long))
        xt = _repeated(self._x0, rows)

        def without_gradient(weights: Any) -> Callable[[], Any]:
            def call() -> None:
                with torch.no_grad():
                    policy.predict(xt, level, cond, weights)

            return call

        def training() -> None:
            policy.predict(xt, level, cond).float().square().mean().backward()

        found: dict[str, Callable[[], Any]] = {
            "reference": without_gradient("ref"),
            "policy": without_gradient("policy"),
            "training": training,
            "rollout step": lambda: self._rollout(cond, decode=False),
        }
        if self._decoded is not None:
            found["decode"] = self._decode(rows)
        return found

    def _rollout(self, cond: Conditioning, decode: bool) -> Any:
        seeds = [torch.Generator().manual_seed(row) for row in range(cond.size)]
        with self.policy.rolling("policy"):
            return self._model.rollout(
                cond,
                steps=STEPS,
                guidance_scale=self._guidance,
                generators=seeds,
                decode=decode,
            )

    def _decode(self, rows: int) -> Callable[[], Any]:
        assert self._decoded is not None
        (latents, *args), kwargs = self._decoded
        given = _repeated(latents, rows)

        def call() -> None:
            with torch.no_grad():
                self._model.pipe.vae.decode(given, *args, **kwargs)

        return call

    def measure(self, rows: int, seconds: float = 0.5) -> Iterator[Measured]:
        """Measure every pass of some rows, one after the other.

        Args:
            rows: the number of samples.
            seconds: how long each pass is repeated, at least three times.

        Yields:
            What was measured. A pass that fails, such as for too little memory, has its error, and
            the next passes follow.
        """
        for name, call in self.of(rows).items():
            try:
                yield self._measured(name, rows, call, seconds)
            except torch.OutOfMemoryError:
                yield Measured(name, rows, error=FULL)
            except Exception as error:  # a broken pass must not hide what the others take
                yield Measured(name, rows, error=told(error))
            finally:
                for parameter in self.policy.parameters():
                    parameter.grad = None

    def _measured(self, name: str, rows: int, call: Callable[[], Any], seconds: float) -> Measured:
        device, share = self._model.device, STEPS if name == "rollout step" else 1
        # once, before blocks are compiled: they do not run under a mode that sees operations
        if (name, rows) not in self._flops:
            self._flops[name, rows] = flops_of(call) / share
        flops = self._flops[name, rows]
        call()
        with waits(device) as found:
            call()
        if cuda := device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        took, host = (one / share for one in timed(call, device, seconds))
        peak = self._peak(name)
        return Measured(
            name,
            rows,
            ms=round(1e3 * took, 3),
            host_ms=round(1e3 * host, 3),
            tflop=flops / 1e12,
            mfu=None if peak is None else round(flops / took / peak, 4),
            peak_gb=round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if cuda else None,
            waits=dict(found),
        )

    def _peak(self, name: str) -> float | None:
        network = self._model.pipe.vae if name == "decode" else self._x0
        return peak_of(self._model.device, network.dtype)


def _repeated(one: Tensor, rows: int) -> Tensor:
    return one[:1].expand(rows, *one.shape[1:]).contiguous()


def flops_of(call: Callable[[], Any]) -> int:
    """Return the operations of a call, of which a multiplication and an addition are two."""
    with flop_counter.FlopCounterMode(display=False, custom_mapping=_ON_THE_CPU) as counted:
        call()
    return counted.get_total_flops()


def timed(call: Callable[[], Any], device: torch.device, least: float) -> tuple[float, float]:
    """Return the median seconds of a call, and those until the host has launched it.

    Args:
        call: what is repeated, after one time that does not count.
        device: what is waited for before and after each time.
        least: the seconds of all times together; there are three times at least.
    """

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    whole: list[float] = []
    host: list[float] = []
    while len(whole) < 3 or sum(whole) < least:
        synchronize()
        began = perf_counter()
        call()
        host.append(perf_counter() - began)
        synchronize()
        whole.append(perf_counter() - began)
    return median(whole), median(host)


def peak_of(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the operations that a GPU can make in a second, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    gpu = next((gpu for kind, gpu in GPUS.items() if kind in name), None)
    if gpu is None:
        return None
    return 1e12 * (gpu.single if dtype == torch.float32 else gpu.half)


class Reads(TorchDispatchMode):
    """Counts where the host reads a number of a tensor, which waits where the tensor is on a GPU.

    Attributes:
        scalars: how often single numbers are read, by file and line.
        copies: how often tensors are copied to the host, by file and line.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scalars: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is _ATEN._local_scalar_dense.default:
            self.scalars[_place()] += 1
        elif func in (_ATEN._to_copy.default, _ATEN.copy_.default):
            source = args[-1] if func is _ATEN._to_copy.default else args[1]
            if source.device.type not in ("cpu", "meta") and made.device.type == "cpu":
                self.copies[_place()] += 1
        return made


@contextmanager
def waits(device: torch.device) -> Iterator[Counter[str]]:
    """Count inside the block how often the host waits for a device, by file and line.

    Of a GPU torch itself tells (``torch.cuda.set_sync_debug_mode``). On the CPU, which nobody waits
    for, the numbers are counted that the host would have to wait for on a GPU.
    """
    found: Counter[str] = Counter()
    if device.type != "cuda":
        with Reads() as reads:
            yield found
        found.update(reads.scalars)
        return

    def note(message: Any, *_: Any, **__: Any) -> None:
        if _SYNCHRONIZES in str(message):
            found[_place()] += 1

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)


_NOT_TOLD = (str(Path(torch.__file__).parent), __file__, warnings.__file__)


def _place() -> str:
    """Return the file and line outside torch that is being executed."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_TOLD):
        frame = frame.f_back
    if frame is None:
        return "torch"
    parts = Path(frame.f_code.co_filename).parts
    inside = [at for at, part in enumerate(parts) if part in ("site-packages", "src")]
    return f"{'/'.join(parts[inside[-1] + 1 :] if inside else parts[-2:])}:{frame.f_lineno}"


def compile_blocks(denoisers: Iterable[nn.Module]) -> None:
    """Compile the blocks that a denoiser repeats, each kind once, as ``compile_repeated_blocks`` of
    diffusers does.

    Models that do not name such blocks name those that must stay whole, which are the same.
    """
    for denoiser in denoisers:
        own: Any = denoiser
        if not getattr(own, "_repeated_blocks", None):
            own._repeated_blocks = getattr(own, "_no_split_modules", None)
        own.compile_repeated_blocks()


def described(device: torch.device) -> str:
    """Return a device as a reader knows it, with torch's version."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}"
