"""Runs that are stopped and go on: in this process, and as processes that are killed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from algorithms.table import predicts_noise
from dgpo import registry
from dgpo.rewards.shipped.stand_in import brightness
from dgpo.trainer import Trainer
from families.tiny import sd3_small, sd15
from tiny_runs import PROMPTS, settings, trainer, without_times


def steps_twice(name: str) -> dict[str, Any]:
    """The settings of a registered algorithm with which an update has two steps or two levels."""
    if registry.resolve("algorithm", name).points == "trajectory":
        return {"updates": 2}
    return {"timesteps": {"count": 2, "indices": (0, 2)}}


def reliable(
    folder: Path, name: str = "dgpo", reward: Any = brightness, resume: bool = False, **changes: Any
) -> Trainer:
    """A trainer of the tiny SD3 by a registered algorithm, with everything that has a state."""
    recipe = settings(
        **{
            "train": {"iterations": 4, "lr": 1e-2, "lr_schedule": "cosine", "warmup": 2},
            "ema": {"decay": 0.5, "every": 3},
            **changes,
        }
    )
    recipe |= {"algorithm": {"name": name, **steps_twice(name)}, "run": {"dir": str(folder)}}
    pipe = sd3_small()
    if predicts_noise(name):
        pipe = sd15()
        recipe["lora"] = recipe["lora"] and {"rank": 4, "targets": ["to_q", "to_k"]}
    return Trainer(
        model=pipe.to(getattr(torch, changes.get("precision", "float32"))),
        reward_funcs=reward,
        train_dataset=PROMPTS,
        recipe=recipe,
        resume=resume,
    )


def stopping(after: int, how: Callable[[], Any]) -> Callable[..., list[float]]:
    """A reward that stops the run while it scores the iteration after ``after`` iterations."""
    calls = itertools.count()

    def score(images: Any, prompts: Any) -> list[float]:
        if next(calls) == after + 1:  # the first is the trial
            how()
        return brightness(images, prompts)

    score.__name__ = "brightness"
    return score


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What the last checkpoint holds."""
    last = max((folder / "checkpoints").glob("[0-9]" * 8))
    return load_file(last / "tensors.safetensors")


def assert_same(one: Path, two: Path, files: tuple[str, ...] = ("metrics.jsonl",)) -> None:
    """Byte for byte but for times; bit for bit in weights, averages and moments."""
    for file in files:
        assert without_times(one, file) == without_times(two, file)
    here, there = tensors(one), tensors(two)
    assert here.keys() == there.keys() and any(n.endswith("exp_avg_sq") for n in here)
    for name, tensor in here.items():
        assert torch.equal(tensor, there[name]), name


def killable(
    folder: str,
    output: str,
    resume: bool,
    operation: int | None,
    training: Any,
    changes: dict[str, Any],
) -> None:
    """Train in a process of its own, which sets the event ``training`` and writes stderr to
    ``output``; at its ``operation``-th call of what writes or deletes files it is killed."""
    _be_quiet(output)
    import dgpo.training.checkpoint_files

    run = trainer(Path(folder), resume=resume, **changes)
    if operation is not None:
        calls = itertools.count()
        for name in ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink"):
            setattr(os, name, _deadly(getattr(os, name), calls, operation))
        saved = _deadly(dgpo.training.checkpoint_files.save_file, calls, operation, _half)
        dgpo.training.checkpoint_files.save_file = saved
    training.set()
    run.train()


def live(
    folder: str, output: str, name: str, resume: bool, kill_in: int | None, changes: dict[str, Any]
) -> None:
    """Train by a registered algorithm in a process of its own; it is killed within the update of
    the iteration after ``kill_in``, when the first optimiser step has moved the weights."""
    _be_quiet(output)
    run = reliable(Path(folder), name, resume=resume, **changes)
    right = run.updater.optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        done = right(*args, **kwargs)
        if run.iteration == kill_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    run.updater.optimizer.step = step
    run.train()


def _be_quiet(output: str) -> None:
    """One thread, stderr in a file, neither curve nor events."""
    torch.set_num_threads(1)
    os.environ["COLUMNS"] = "500"
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    import dgpo.run.loggers.tensorboard
    import dgpo.run.tracking

    dgpo.run.tracking.curve = lambda *args: None  # pyright: ignore
    dgpo.run.loggers.tensorboard.event_writer = lambda *args: _NoEvents()


def _deadly(function: Any, calls: Any, operation: int, last: Any = None) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == operation:
            if last is not None:
                last(function, *args)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def _half(save: Any, tensors: Any, file: Path) -> None:
    """What a kill in the middle of the writing leaves."""
    save(tensors, file)
    os.truncate(file, file.stat().st_size // 2)


class _NoEvents:
    def add_scalar(self, *args: Any) -> None: ...
    def close(self) -> None: ...


def processes() -> Any:
    """Processes that are forked from one that has imported everything and computed nothing."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # the first process of Python 3.11 does not take over sys.path, and would preload nothing
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reliable"])
    return context
