"""A stop within a long update is heard between two micro-batches and leaves no trace."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dgpo.errors import UserError
from dgpo.trainer import Trainer
from dgpo.training.checkpoint_files import find_checkpoint
from reliable import assert_same, reliable
from tiny_runs import light

A_STEP_A_LEVEL: dict[str, Any] = {"train": {"optimizer_step": "timestep"}}
UPDATES: dict[str, tuple[str, dict[str, Any], int]] = {
    # algorithm, settings, and the training pass of the second iteration in which the signal comes.
    # 8 pictures, 3 at once, 2 levels or steps: 6 passes an iteration, or 4 in each of two updates
    "before the step": ("dgpo", {}, 2),
    "between two steps": ("dgpo", A_STEP_A_LEVEL, 5),
    "between two epochs": ("dgpo", {"train": {"inner_epochs": 2}}, 8),
    "weights of a group": ("crd", {}, 4),
    "between two updates": ("flow_grpo", {}, 4),
}
FULL: dict[str, Any] = {"lora": None, "train": {"lr": 1e-3, "optimizer_step": "timestep"}}


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


def long_update(folder: Path, name: str, resume: bool = False, **changes: Any) -> Trainer:
    train = {"iterations": 2, "lr": 1e-2, "micro_batch": 3, **changes.pop("train", {})}
    return reliable(folder, name, resume=resume, train=train, **changes)


def on_pass(run: Trainer, number: int, act: Callable[[], Any]) -> list[int]:
    """Act in the training pass of that number; the list grows with each of them."""
    passes: list[int] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            passes.append(len(passes) + 1)
            if len(passes) == number:
                act()

    (denoiser,) = run.model.denoisers.values()
    denoiser.register_forward_hook(note)
    return passes


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("kind", UPDATES)
def test_sigterm_is_heard_between_micro_batches(kind: str, tmp_path: Path) -> None:
    name, changes, number = UPDATES[kind]
    through = long_update(tmp_path / "through", name, **changes)
    every = on_pass(through, 0, terminate)
    through.train()
    each = len(every) // 2
    run = long_update(tmp_path / "run", name, **changes)
    passes = on_pass(run, each + number, terminate)
    with pytest.raises(SystemExit) as stopped:
        run.train()
    assert stopped.value.code == 0
    assert len(passes) == each + number, "it went on after the micro-batch in which it was stopped"
    assert find_checkpoint(tmp_path / "run/checkpoints").iteration == 1
    long_update(tmp_path / "run", name, resume=True, **changes).train()
    assert_same(tmp_path / "through", tmp_path / "run")


def test_the_same_object_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    long_update(tmp_path / "through", "dgpo", **A_STEP_A_LEVEL).train()
    run = long_update(tmp_path / "run", "dgpo", **A_STEP_A_LEVEL)
    on_pass(run, 5, lambda: signal.raise_signal(signal.SIGINT))  # between two steps of the first
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.iteration == run.updater.step == 0 and not run.updater.optimizer.state
    run.train()
    assert_same(tmp_path / "through", tmp_path / "run")


@pytest.mark.parametrize("what", ["Tracker", "Progress"])
def test_the_same_object_begins_after_ctrl_c_while_the_run_folder_is_made(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    run = long_update(tmp_path, "dgpo")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(f"dgpo.training.routine.{what}", stop)
        run.train()
    assert (tmp_path / "recipe.yaml").exists() == (what == "Progress")
    run.train()
    assert run.iteration == 2


def test_all_weights_between_two_steps_go_back_to_the_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No copy of all weights is kept, and what is saved is never half of an update."""
    changes: dict[str, Any] = {**FULL, "checkpoint": {"every": 1}}
    long_update(tmp_path / "through", "dgpo", **changes).train()
    run = long_update(tmp_path / "run", "dgpo", **changes)
    on_pass(run, 6 + 5, terminate)
    with pytest.raises(SystemExit):
        run.train()
    said = " ".join(capsys.readouterr().err.split())
    assert "stopped in the middle of an update; the checkpoint before it stands" in said
    assert find_checkpoint(tmp_path / "run/checkpoints").iteration == 1
    with pytest.raises(UserError, match=r"belong to no iteration.*resume=True"):
        run.train()
    long_update(tmp_path / "run", "dgpo", resume=True, **changes).train()
    assert_same(tmp_path / "through", tmp_path / "run")


def test_where_there_is_no_checkpoint_before_it_none_is_promised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = long_update(tmp_path / "run", "dgpo", **FULL)
    on_pass(run, 5, terminate)
    with pytest.raises(SystemExit):
        run.train()
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "in the middle of an update; there is no checkpoint yet, and the run begins again" in said
    )
    assert long_update(tmp_path / "run", "dgpo", resume=True, **FULL).iteration == 0
