"""Runs of a few seconds: the tiny SD3, pictures of 16 pixels, stand-in rewards."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dgpo.algorithms.dgpo import DGPO
from dgpo.core.points import Forward
from dgpo.rewards.shipped.stand_in import brightness
from dgpo.trainer import Trainer
from families.tiny import sd3_small

PROMPTS = ["a photo of cat", "red dog", "the small house", "big table"]
TIMESTEPS: dict[str, Any] = {"count": 2, "indices": (0, 2)}
SETTINGS: dict[str, Any] = {
    "algorithm": {"timesteps": TIMESTEPS},
    "group_size": 4,
    "groups_per_iteration": 2,
    "rollout": {"steps": 3, "call": {"height": 16, "width": 16}},
    "train": {"iterations": 2, "lr": 1e-2},
    "lora": {"rank": 4, "alpha": 12},
    "ema": {"decay": 0.5, "every": 1},
    "eval": {"every": 0, "at_start": False},
    "samples": {"count": 0},
    "checkpoint": {"every": 0},
}


def settings(**changes: Any) -> dict[str, Any]:
    """``SETTINGS`` with changes, sections merged key by key."""
    merged = deepcopy(SETTINGS)  # a test may change what it gets
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def trainer(folder: Path, reward: Any = brightness, **given: Any) -> Trainer:
    """A trainer of the tiny SD3; what is no argument of :class:`Trainer` changes a setting."""
    own = ("model", "train_dataset", "eval_dataset", "algorithm", "resume", "callbacks")
    arguments = {key: given.pop(key) for key in own if key in given}
    arguments = {"model": sd3_small(), "train_dataset": PROMPTS, **arguments}
    recipe = settings(**given, run={"dir": str(folder)})
    return Trainer(**arguments, reward_funcs=reward, recipe=recipe)


def without_times(folder: Path, file: str = "metrics.jsonl") -> list[str]:
    """The lines of a run's file as they were written, but for the values of ``seconds...``."""
    lines = []
    for line in (folder / file).read_text().splitlines():
        row = json.loads(line)
        timed = {key: 0 if key.startswith("seconds") else value for key, value in row.items()}
        lines.append(json.dumps(timed, ensure_ascii=False))
    return lines


def rows(folder: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the curve and the events, which have tests of their own."""

    class NoEvents:
        def add_scalar(self, *args: Any) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr("dgpo.run.tracking.curve", lambda *args: None)
    monkeypatch.setattr("dgpo.run.loggers.tensorboard.event_writer", lambda *args: NoEvents())


class Spy(DGPO):
    """DGPO that shows what its loss was given."""

    seen: ClassVar[list[Forward]] = []
    on_loss: ClassVar[list[Callable[[], None]]] = []

    def loss(self, points: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(points)
        for call in self.on_loss:
            call()
        return super().loss(points)


class Calls:
    """The batch size and the timestep of every call of a denoiser while the block runs."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.denoiser = denoiser
        self.sizes: list[int] = []
        self.timesteps: list[float] = []

    def __enter__(self) -> Calls:
        def note(module: Any, inputs: Any, named: dict[str, Any]) -> None:
            self.sizes.append(len(named["hidden_states"]))
            self.timesteps.append(float(named["timestep"].reshape(-1)[0]))

        self._hook = self.denoiser.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
