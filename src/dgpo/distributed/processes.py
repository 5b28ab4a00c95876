"""The processes of a run: who they are, and what they tell each other."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dgpo.distributed.watch import Watch
from dgpo.errors import UserError
from dgpo.interrupts import Terminated, hear_again

T = TypeVar("T")
BUCKET = 1 << 26
"""How many numbers are summed over the processes at once. They are copied for it."""
LIMIT = timedelta(hours=1)
"""When a backend gives up an operation. It names no process, so the watch gives up sooner
(guards.hang_minutes); this limit is for a device that hangs while no process is behind another."""


class Processes:
    """``Processes`` are the processes of a run; by default a single one.

    Processes exchange JSON values and plain tensors. All processes must call every method that says
    *collective*, in the same order.

    Args:
        rank: the number of this process, from 0.
        size: how many there are.
        device: where this process computes; None for a GPU if there is one.
        watch: looks after the other processes; None if there are none.
        control: the group in which the processes talk on the CPU.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        device: torch.device | None = None,
        watch: Watch | None = None,
        control: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.size, self.watch = rank, size, watch
        self.heard = 0
        """The signal that asks this process to stop, kept by
        :func:`dgpo.distributed.signals.deferred`; 0 for none."""
        self._device, self._control = device, control

    @property
    def device(self) -> torch.device:
        """Return the device for a model that is loaded by its name."""
        return self._device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def main(self) -> bool:
        """Return whether this process writes the run folder and speaks for all."""
        return self.rank == 0

    @property
    def single(self) -> bool:
        """Return whether there are no other processes."""
        return self.size == 1

    def split(self, count: int, parts: int = 1) -> tuple[Tensor, ...]:
        """Return which of ``count`` places each process has, as [n] ascending numbers.

        The places are cut into ``parts`` equal runs. Every run is spread evenly over the processes,
        and each process gets neighbouring places.
        """
        runs = torch.arange(count).tensor_split(parts)
        shared = [run.tensor_split(self.size) for run in runs]
        return tuple(torch.cat([run[rank] for run in shared]) for rank in range(self.size))

    def all_gather_object(self, value: T, what: str) -> list[T]:
        """Return the JSON values of all processes, by rank. Collective.

        Args:
            value: numbers (also NaN), texts, None, lists, and dicts whose keys are texts.
            what: describes the value in the message that names a missing process.
        """
        if self.single:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self._meeting(what):
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            # on the CPU, so that it does not wait for what the GPU has yet to do
            dist.all_gather(sizes, torch.tensor([len(mine)]), group=self._control)
            room = int(torch.cat(sizes).max())  # gathering wants tensors of one size
            padded = torch.cat([mine, mine.new_zeros(room - len(mine))])
            found = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(found, padded, group=self._control)
        return [
            json.loads(text[: int(length)].numpy().tobytes())
            for text, length in zip(found, sizes, strict=True)
        ]

    def broadcast_object(self, make: Callable[[], T], what: str) -> T:
        """Return in all processes the JSON value that the main one makes. Collective."""
        if self.single:
            return make()
        return self.all_gather_object(make() if self.main else None, what)[0]  # pyright: ignore[reportReturnType]

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes, the same in all of them. Collective."""
        if self.single:
            return x
        total = x.contiguous().clone()  # the sum is written in place, and x is the caller's
        with self._meeting("a sum over the processes"):
            dist.all_reduce(total, group=self._control if x.device.type == "cpu" else None)
        return total

    def broadcast(self, x: Tensor) -> Tensor:
        """Copy a CPU tensor of the main process into ``x`` of all processes. Collective.

        Args:
            x: a tensor whose shape and dtype are the same in all processes.

        Returns:
            ``x``.
        """
        if not self.single:
            with self._meeting("tensors of the main process"):
                dist.broadcast(x, src=0, group=self._control)
        return x

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes. Collective.

        A parameter without a gradient in any process is left without one, so that the optimiser
        passes it over.
        """
        if self.single:
            return
        # a process without rows in this step has no gradients, and takes part with zeros
        held = self.sum(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64))
        some = [p for p, count in zip(parameters, held.tolist(), strict=True) if count]
        for parameter in some:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        # few large sums instead of many small ones; the buckets are alike in all processes
        for bucket in _buckets([p.grad for p in some if p.grad is not None]):
            total = self.sum(torch.cat([gradient.reshape(-1) for gradient in bucket]))
            sums = total.split([gradient.numel() for gradient in bucket])
            for gradient, summed in zip(bucket, sums, strict=True):
                gradient.copy_(summed.view_as(gradient))

    def stop_if_asked(self, what: str) -> None:
        """Stop here if a signal has asked any of the processes to. Collective.

        A single process has stopped already, unless a SIGTERM came where nothing could be raised.

        Args:
            what: is about to be done.

        Raises:
            KeyboardInterrupt: a process has received Ctrl-C.
            Terminated: a process has received SIGTERM.
        """
        if self.single:
            return hear_again()  # no other process waits, so signals are raised where they come
        # all decide by the same number, so that all stop at the same place or none does
        heard = max(self.all_gather_object(self.heard, what))
        self.heard = 0
        if heard == signal.SIGINT:
            raise KeyboardInterrupt
        if heard:
            raise Terminated

    def refuse_difference(self, facts: dict[str, str]) -> None:
        """Refuse to go on if processes were given different things. Collective.

        Args:
            facts: by the names that the user knows.

        Raises:
            UserError: a process was given something else than the first.
        """
        # all see all facts and raise together: one that raised alone would leave the others waiting
        every = self.all_gather_object(facts, "what the processes were given")
        for rank, other in enumerate(every):
            wrong = [name for name in facts if other.get(name) != every[0].get(name)]
            if wrong:
                raise UserError(
                    f"process {rank} of {self.size} was given another {' and another '.join(wrong)}"
                    " than process 0: all need the same command, recipe and files"
                )

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """An exception in the block ends all processes, and they say why.

        ``KeyboardInterrupt`` and ``SystemExit`` are left alone.
        """
        try:
            yield
        except Exception as error:
            if self.watch is not None:
                self.watch.fail(error)
            raise

    @contextmanager
    def _meeting(self, what: str) -> Iterator[None]:
        assert self.watch is not None
        with self.watch.waiting(what):
            yield


SINGLE = Processes()
_started: Processes | None = None


def current_processes() -> Processes:
    """Return the processes that a launcher has started together; :data:`SINGLE` without a launcher.

    The first call connects them by the variables that launchers set (``RANK``, ``WORLD_SIZE``,
    ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``), unless the program has connected them itself.

    Raises:
        UserError: a variable is missing, or a machine runs more processes than it has GPUs.
    """
    global _started
    if _started is None:
        several = dist.is_available() and (dist.is_initialized() or _number("WORLD_SIZE", 1) > 1)
        if not several:
            return SINGLE
        _started = _connect()
        atexit.register(leave)  # also where the user's program ends without the trainer
        _tell_of_what_nobody_catches()
    return _started


def started() -> bool:
    """Return whether this process is one of several that a launcher has started."""
    return _started is not None or _number("WORLD_SIZE", 1) > 1


def tell(error: Exception) -> None:
    """Tell the other processes, if there are any, why this one ends. They end too."""
    if _started is not None and _started.watch is not None:
        _started.watch.fail(error)


def leave() -> None:
    """Say goodbye to the other processes. Afterwards each ends on its own."""
    global _started
    if _started is None:
        return
    watch, _started = _started.watch, None
    if watch is not None and watch.stop() and dist.is_initialized():
        dist.destroy_process_group()


def _connect() -> Processes:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and not dist.is_initialized():
        raise UserError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']} but {', '.join(missing)} is not set: start "
            "the processes by torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    device = _own_device()
    if not dist.is_initialized():
        own = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        backend = "gloo" if device.type == "cpu" else own
        dist.init_process_group(backend, timeout=LIMIT)
    # the store by which torch has connected the processes; the prefix keeps our keys apart
    store = dist.PrefixStore("dgpo", dist.distributed_c10d._get_default_store())
    # no limit that matters: the watch is what gives up, and it can name the slow process
    control = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    watch = Watch(store, dist.get_rank(), dist.get_world_size())
    assert isinstance(control, dist.ProcessGroup)
    return Processes(watch.rank, watch.size, device, watch, control)


def _own_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return torch.device("cpu")
    local, count = _number("LOCAL_RANK", 0), torch.accelerator.device_count()
    if local >= count:
        raise UserError(
            f"process {local} of this machine has no {accelerator.type} device, there are {count}: "
            f"start at most {count} processes on each machine (--nproc-per-node)"
        )
    torch.accelerator.set_device_index(local)
    return torch.device(accelerator.type, local)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.strip().isdigit():
        raise UserError(f"{name} = {text!r} in the environment should be a whole number")
    return int(text)


def _tell_of_what_nobody_catches() -> None:
    """Let an exception in the user's own program, outside the trainer, end the other processes."""
    before = sys.excepthook

    def hook(kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, Exception):
            tell(error)
        before(kind, error, trace)

    sys.excepthook = hook


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield neighbouring tensors of one dtype and device, about :data:`BUCKET` numbers at once."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        same = not bucket or (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and (not same or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
