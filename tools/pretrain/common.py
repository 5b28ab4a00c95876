"""A stage of pretraining: a seeded loop that saves, resumes, averages and shows its progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Training:
    """How long and how fast a stage trains.

    Args:
        steps: the number of optimiser steps.
        batch: the number of examples in a step.
        lr: the learning rate of AdamW.
        seed: the seed of weights, batches and noise.
    """

    steps: int
    batch: int
    lr: float
    seed: int = 0


class Averaged:
    """The exponential moving average of modules' parameters, which is what is shipped.

    Inside ``with average:`` the modules hold the average.
    """

    def __init__(self, modules: list[nn.Module], decay: float = 0.999):
        self.parameters = [p for m in modules for p in m.parameters()]
        self.values = [p.detach().clone() for p in self.parameters]
        self.decay = decay
        self.steps = 0

    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        current = [p.detach() for p in self.parameters]
        torch._foreach_lerp_(self.values, current, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, parameter in zip(self.values, self.parameters, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


class Stage:
    """One stage of pretraining, with a checkpoint and a log in its folder.

    Args:
        folder: where ``state.safetensors`` (weights, averages, optimisers) and ``log.jsonl`` go.
        modules: the modules to train.
        optimizers: their optimisers.
        steps: the number of steps; :meth:`run` yields those that are left.
        seed: the seed of every step's random numbers.
        save_every: the number of steps between checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        modules: list[nn.Module],
        optimizers: list[torch.optim.Optimizer],
        steps: int,
        seed: int,
        save_every: int = 500,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.modules, self.optimizers = folder, modules, optimizers
        self.steps, self.seed, self.save_every = steps, seed, save_every
        self.average = Averaged(modules)
        self.seconds = 0.0
        self.start = 0
        self.running: dict[str, list[float]] = {}
        if (folder / "state.safetensors").exists():
            self._load()

    def run(
        self, evaluate: Callable[[], dict[str, float]], every: int, hold: float | None = None
    ) -> Iterator[int]:
        """Yield step numbers; after each step average, evaluate and save if that is due.

        Args:
            evaluate: returns the figures to log, of the averaged weights.
            every: the number of steps between evaluations.
            hold: see :func:`schedule`; None leaves the learning rates alone.
        """
        began = time.monotonic() - self.seconds
        steps = track(
            range(self.start, self.steps),
            description=f"pretraining: {self.folder.name}",
            console=Console(stderr=True),
            transient=True,
        )
        for step in steps:
            for optimizer in self.optimizers if hold is not None else ():
                schedule(optimizer, step, self.steps, hold or 0.0)
            yield step
            self.average.update()
            self.seconds = time.monotonic() - began
            done = step + 1
            if done % every == 0 or done == self.steps:
                paused = time.monotonic()
                with self.average:
                    figures = evaluate()
                self.log(done, figures)
                began += time.monotonic() - paused
            if done % self.save_every == 0 or done == self.steps:
                self._save(done)

    def learn(self, loss: Tensor) -> None:
        """Take an optimiser step down the gradient of a loss, which is clipped to a norm of 1."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.average.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()

    @torch.no_grad()
    def finish(self) -> None:
        """Give the modules the averaged weights for good."""
        for value, parameter in zip(self.average.values, self.average.parameters, strict=True):
            parameter.copy_(value)

    def note(self, **figures: float) -> None:
        """Remember the figures of a step; the log shows their mean since the last report."""
        for key, value in figures.items():
            self.running.setdefault(key, []).append(value)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Write a row of figures to ``log.jsonl`` and print it."""
        means = {k: sum(v) / len(v) for k, v in self.running.items() if v}
        self.running = {}
        row = {"step": step, "seconds": round(self.seconds, 1), **means, **figures}
        row = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{self.folder.name} {step}/{self.steps}", row, flush=True)

    def generator(self, step: int) -> torch.Generator:
        """Return the random numbers of a step: the same whether or not the stage was resumed."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"average.{i}": v for i, v in enumerate(self.average.values)}
        for i, module in enumerate(self.modules):
            state = module.state_dict()
            tensors |= {f"module.{i}.{k}": v.detach().clone() for k, v in state.items()}
        for i, optimizer in enumerate(self.optimizers):
            for j, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{j}.{k}": torch.as_tensor(v) for k, v in state.items()}
        return tensors

    def _save(self, step: int) -> None:
        meta = {"step": str(step), "seconds": str(self.seconds), "average": str(self.average.steps)}
        target = self.folder / "state.safetensors"
        save_file(
            {k: v.contiguous() for k, v in self._tensors().items()}, f"{target}.new", metadata=meta
        )
        Path(f"{target}.new").replace(target)

    @torch.no_grad()
    def _load(self) -> None:
        from safetensors import safe_open

        path = self.folder / "state.safetensors"
        with safe_open(path, "pt") as file:
            meta = file.metadata()
        tensors = load_file(path)
        for i, value in enumerate(self.average.values):
            value.copy_(tensors[f"average.{i}"])
        for i, module in enumerate(self.modules):
            start = f"module.{i}."
            module.load_state_dict(
                {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
            )
        for i, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{i}."):
                    _, _, index, name = key.split(".", 3)
                    state.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.start = int(meta["step"])
        self.seconds = float(meta["seconds"])
        self.average.steps = int(meta["average"])


def schedule(optimizer: torch.optim.Optimizer, step: int, steps: int, hold: float) -> None:
    """Warm up over 100 steps, hold the rate for a share of the steps, then decay linearly to 2%."""
    part = step / steps
    factor = min(1.0, (step + 1) / 100)
    if part > hold:
        factor *= max(0.02, (1 - part) / (1 - hold))
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("top_lr", group["lr"]) * factor
