"""Reading a safetensors file in the main process for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dgpo.distributed.processes import Processes

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}


def described(file: Path | None) -> dict[str, list[Any]]:
    """Dtype and shape of every tensor of a file, as JSON values."""
    assert file is not None, "the main process knows the file"
    with safe_open(file, "pt") as opened:
        parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: [part.get_dtype(), part.get_shape()] for name, part in parts.items()}


def read(
    file: Path | None, facts: Mapping[str, list[Any]], processes: Processes
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file by name, on the CPU of every process. Collective.

    Args:
        file: None but in the main process.
        facts: what :func:`described` says there.
        processes: the processes of the run.
    """
    with ExitStack() as stack:
        opened: Any = None
        if processes.main:
            assert file is not None, "the main process knows the file"
            opened = stack.enter_context(safe_open(file, "pt"))
        for name, (dtype, shape) in facts.items():
            if opened is None:
                value = torch.empty(shape, dtype=_DTYPES[dtype])
            else:
                value = opened.get_tensor(name)
            yield name, processes.broadcast(value)
