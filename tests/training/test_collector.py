"""Pictures sampled ahead: nothing shows that a run was stopped while some were waiting."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dgpo.distributed.assignment import Assignment
from dgpo.distributed.processes import Processes
from dgpo.rewards.shipped.stand_in import brightness
from reliable import assert_same, processes, reliable, stopping, tensors
from tiny_runs import light, rows

RUN: dict[str, Any] = {
    # rewards are asked when their iteration is trained, so that they can stop it
    "rollout": {
        "steps": 3,
        "call": {"height": 16, "width": 16},
        "ahead": 2,
        "overlap_rewards": False,
    },
    "train": {"iterations": 5, "lr": 1e-2, "lr_schedule": "cosine", "warmup": 2},
    "checkpoint": {"every": 2},
}


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that was not stopped."""
    folder = tmp_path_factory.mktemp("through")
    with pytest.MonkeyPatch.context() as patch:
        light(patch)
        reliable(folder, **RUN).train()
        yield folder


def interrupt() -> None:
    raise KeyboardInterrupt


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_the_fourth(folder: str, threads: int) -> None:
    torch.set_num_threads(threads)
    import dgpo.run.loggers.tensorboard

    dgpo.run.loggers.tensorboard.event_writer = lambda *args: _NoEvents()
    reliable(Path(folder), reward=stopping(3, kill), **RUN).train()


class _NoEvents:
    def add_scalar(self, *args: Any) -> None: ...
    def close(self) -> None: ...


def held(checkpoint: Path) -> list[str]:
    with safe_open(checkpoint / "ahead.safetensors", "pt") as file:
        return sorted(file.keys())


IN_FLIGHT = {**RUN, "rollout": {**RUN["rollout"], "overlap_rewards": None}}


def test_rewards_in_flight_change_nothing(through: Path, tmp_path: Path) -> None:
    called: list[tuple[str, int]] = []

    def score(images: Any, prompts: list[str]) -> list[float]:
        called.append((threading.current_thread().name, run.iteration))
        return brightness(images, prompts)

    run = reliable(tmp_path, reward=score, **IN_FLIGHT)
    run.train()
    mine, other = rows(tmp_path), rows(through)
    assert all(row["seconds_reward_hidden"] >= 0 for row in mine)
    for key in ("reward_mean", "reward_std", "loss", "grad_norm", "samples_lost"):
        assert [row[key] for row in mine] == [row[key] for row in other]
    here, there = tensors(tmp_path), tensors(through)
    assert all(torch.equal(tensor, here[name]) for name, tensor in there.items())
    asked = [one for one in called if one[0] == "reward"]  # the first call tries the reward
    assert len(asked) == 5
    # the next iterations' pictures are scored before theirs begins
    assert sum(at < number for number, (_, at) in enumerate(asked)) >= 3


def test_a_stop_while_rewards_are_in_flight_shows_nowhere(through: Path, tmp_path: Path) -> None:
    def interrupt_once(*_: Any, **__: Any) -> None:
        if run.iteration == 2:
            raise KeyboardInterrupt

    run = reliable(tmp_path, **IN_FLIGHT)
    update = run.updater.update
    run.updater.update = lambda *given: interrupt_once() or update(*given)  # pyright: ignore
    with pytest.raises(KeyboardInterrupt):
        run.train()
    again = reliable(tmp_path, resume=True, **IN_FLIGHT)
    assert again.iteration == 2
    again.train()
    here, there = tensors(tmp_path), tensors(through)
    assert all(torch.equal(tensor, here[name]) for name, tensor in there.items())


@pytest.mark.parametrize("again", ["in this process", "in another"])
def test_two_halves_are_the_whole(again: str, through: Path, tmp_path: Path) -> None:
    run = reliable(tmp_path, reward=stopping(2, interrupt), **RUN)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    # those of the fifth are made by weights that are saved: only those of earlier ones are kept
    names = ("images", "lost", "timesteps", "x0")
    assert held(tmp_path / "checkpoints/00000002") == [f"{n}.{x}" for n in (2, 3) for x in names]
    if again == "in another":
        run = reliable(tmp_path, resume=True, **RUN)
        assert run.iteration == 2
    run.train()
    assert_same(through, tmp_path)
    assert not (tmp_path / "checkpoints/00000005/ahead.safetensors").exists()


def test_a_kill_after_a_checkpoint_shows_nowhere(through: Path, tmp_path: Path) -> None:
    arguments = (str(tmp_path), torch.get_num_threads())
    process = processes().Process(target=killed_in_the_fourth, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(rows(tmp_path)) == 3
    run = reliable(tmp_path, resume=True, **RUN)
    assert run.iteration == 2
    run.train()
    assert_same(through, tmp_path)


def test_a_second_stop_keeps_what_the_first_has_kept(through: Path, tmp_path: Path) -> None:
    place = "checkpoints/00000002"
    with pytest.raises(KeyboardInterrupt):
        reliable(tmp_path, reward=stopping(2, interrupt), **RUN).train()
    before = (tmp_path / place / "ahead.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        reliable(tmp_path, reward=stopping(0, interrupt), resume=True, **RUN).train()
    assert (tmp_path / place / "ahead.safetensors").read_bytes() == before
    reliable(tmp_path, resume=True, **RUN).train()
    assert_same(through, tmp_path)


def test_pictures_of_other_settings_are_left_aside(
    through: Path, tmp_path: Path, capsys: Any
) -> None:
    copytree(through, tmp_path, dirs_exist_ok=True)
    other = {**RUN, "group_size": 3}
    (tmp_path / "checkpoints/00000005").rename(tmp_path / "later")
    run = reliable(tmp_path, resume=True, **other)
    assert run.iteration == 4
    run.train()
    said = " ".join(capsys.readouterr().err.split())
    assert "left aside: what was sampled ahead for iteration 5 has other prompts" in said
    assert rows(tmp_path)[-1]["images"] == 4 * 8 + 6


def test_facts_of_a_checkpoint(through: Path) -> None:
    state = json.loads((through / "checkpoints/00000004/state.json").read_text())
    (facts,) = state["ahead"].values()
    assert (facts["during"], facts["media"]) == (2, {"kind": "picture"})
    assert facts["made_for"]["group_size"] == 4 and len(facts["made_for"]["prompts"]) == 2
    assert all(name.split(".")[0] != "4" for name in tensors(through))


class _Two(Processes):
    """The first of two processes; what the second gives to a sum is known."""

    other: Tensor

    def sum(self, x: Tensor) -> Tensor:
        return x + self.other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_rows_of_all_processes_bit_for_bit(dtype: torch.dtype) -> None:
    every = torch.tensor([[-0.0, 1.5], [3.0, 0.0], [7.0, 2.0]]).to(dtype)
    two = _Two(0, 2)
    share = Assignment((torch.tensor([0, 2]), torch.tensor([1])), 3, two)
    two.other = torch.zeros_like(every)
    two.other[1] = every[1]
    two.other = two.other.view(torch.uint8)
    found = share.whole(every[[0, 2]])
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), every.view(torch.uint8))
