"""Checkpoints: all that the future of a run depends on, as safetensors and JSON.

Random numbers and the order of prompts are functions of the seed and the iteration
(:mod:`dgpo.core.seeds`), so what has to be kept is the weights, their averages, the optimiser and
the counters.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgpo.errors import UserError
from dgpo.models.policy import Policy
from dgpo.updating import Updater

_STATE = "state.json"
_TENSORS = "tensors.safetensors"


def save_checkpoint(
    folder: Path, policy: Policy, updater: Updater, counters: dict[str, Any]
) -> None:
    """Write a checkpoint folder; a folder of that name is replaced once the new one is whole.

    Args:
        folder: e.g. ``RUN/checkpoints/last``.
        counters: JSON values, at least ``iteration``.
    """
    new, old = (folder.with_name(f"{folder.name}.{age}") for age in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    tensors = policy.state_dict() | {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, state in updater.optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_file({k: v.contiguous() for k, v in tensors.items()}, new / _TENSORS)
    state = {"optimizer_step": updater.step, **counters}
    (new / _STATE).write_text(json.dumps(state, indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path:
    """Where the whole checkpoint is that ``folder`` stands for.

    Raises:
        UserError: there is none.
    """
    previous = folder.with_name(f"{folder.name}.old")  # a stop came between the two renames
    for place in (folder, previous):
        if (place / _STATE).is_file():
            return place
    raise UserError(
        f"{folder} holds no checkpoint to go on from: start without --resume (resume=True), in "
        "another run.dir or after deleting this one if it holds a run that was cut off early"
    )


def load_checkpoint(folder: Path, policy: Policy, updater: Updater) -> dict[str, Any]:
    """Put a checkpoint's weights, averages and optimiser back; returns its counters.

    Raises:
        UserError: there is no whole checkpoint, or it belongs to other settings.
    """
    folder = find_checkpoint(folder)
    state = json.loads((folder / _STATE).read_text())
    tensors = load_file(folder / _TENSORS)
    moments: dict[int, dict[str, Tensor]] = {}
    for name in [name for name in tensors if name.startswith("optimizer.")]:
        _, index, field = name.split(".", 2)
        moments.setdefault(int(index), {})[field] = tensors.pop(name)
    policy.load_state_dict(tensors)
    updater.optimizer.load_state_dict({**updater.optimizer.state_dict(), "state": moments})
    updater.step = state["optimizer_step"]
    return state
