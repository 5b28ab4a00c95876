"""The machine that a plan is for, and how long GPUs would take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Device = Literal["cuda", "cpu"]
SHARE_OF_PEAK = 0.25
"""The part of a GPU's peak that an iteration is assumed to reach; no GPU has confirmed it."""


@dataclass(frozen=True)
class Machine:
    """A machine that a run is planned for.

    Args:
        device: ``cuda`` or ``cpu``.
        gpus: the number of GPUs, each with a process of its own.
    """

    device: Device
    gpus: int = 1

    @classmethod
    def here(cls) -> Machine:
        """Return this machine, with one GPU if it has any."""
        return cls("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, as its maker describes it.

    Args:
        memory: in GB.
        half: the peak of matrix products in bfloat16 and float16 with sums in float32 and without
            sparsity, in TFLOP/s.
        single: the peak in float32, in TFLOP/s, without TF32.
    """

    memory: int
    half: float
    single: float


GPUS = {
    "H200": Gpu(141, 989, 67),
    "H100": Gpu(80, 989, 67),
    "A100": Gpu(80, 312, 19.5),
    "L40S": Gpu(48, 362, 91.6),
    "RTX 4090": Gpu(24, 165, 82.6),
    "RTX 3090": Gpu(24, 71, 35.6),
}
"""The GPUs that a plan names, by the figures of their data sheets."""
