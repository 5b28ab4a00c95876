"""A run that has ended, or was stopped: what a trainer says of it, and how it goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dgpo.algorithms import FlowGRPO
from dgpo.errors import UserError
from dgpo.trainer import Trainer
from families.tiny import sd3_small
from reliable import assert_same, reliable
from tiny_runs import PROMPTS, brightness, light, rows, settings, trainer


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


def again(folder: Path, overrides: Any = (), **given: Any) -> Trainer:
    usual = {"model": sd3_small(), "reward_funcs": brightness, "train_dataset": PROMPTS}
    return Trainer.from_run(folder, overrides, **{**usual, **given})


def test_train_after_the_end_says_why_nothing_is_trained(tmp_path: Path, capsys: Any) -> None:
    run = trainer(tmp_path, eval_dataset=PROMPTS[:2])
    report = run.train()
    assert report is not None and report is run.last_report
    assert report.overall == rows(tmp_path, "evaluations.jsonl")[-1]["overall"]
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert run.train() is report
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing is trained" in said and "train.iterations = 2" in said
    assert f"Trainer.from_run('{tmp_path}', ['train.iterations=MORE'])" in said
    assert before == {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()}


def test_a_run_that_is_resumed_at_its_end_says_so_too(tmp_path: Path, capsys: Any) -> None:
    trainer(tmp_path).train()
    capsys.readouterr()
    again(tmp_path).train()
    said = " ".join(capsys.readouterr().err.split())
    assert "nothing is trained" in said and "['train.iterations=MORE']" in said
    assert len(rows(tmp_path)) == 2


def test_from_run_goes_on_where_the_run_ended(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"train": {"iterations": 4, "lr": 1e-2}}
    reliable(tmp_path / "through", **plain).train()
    short: dict[str, Any] = {"train": {"iterations": 2, "lr": 1e-2}}
    reliable(tmp_path / "run", **short).train()
    run = again(tmp_path / "run", ["train.iterations=4"])
    assert run.iteration == 2 and [row["iteration"] for row in run.state.log_history] == [1, 2]
    run.train()
    assert_same(tmp_path / "through", tmp_path / "run")
    assert [row["iteration"] for row in run.state.log_history] == [1, 2, 3, 4]
    assert run.state.log_history == rows(tmp_path / "run")


def test_the_history_has_evaluations_in_their_order(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=PROMPTS[:2], eval={"every": 1, "at_start": True})
    run.train()
    kinds = ["overall" in row for row in run.state.log_history]
    assert kinds == [True, False, True, False, True]
    assert run.state.evaluations == rows(tmp_path, "evaluations.jsonl")
    assert run.state.rows == rows(tmp_path)
    assert again(tmp_path).state.log_history == run.state.log_history


def test_resume_takes_the_last_run_or_the_one_that_is_named(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "c")):
        trainer(tmp_path / name, train={"iterations": 1 + number}).train()
    for file in (tmp_path / "b").iterdir():
        os.utime(file, (4e9, 4e9))
    given = {"model": sd3_small(), "reward_funcs": brightness, "train_dataset": PROMPTS}
    recipe = settings(run={"dir": str(tmp_path / "new")})
    last = Trainer(**given, recipe=recipe, resume="last")
    assert last.folder == tmp_path / "b" and last.iteration == 2
    named = Trainer(**{**given, "model": sd3_small()}, recipe=recipe, resume=tmp_path / "c")
    assert named.folder == tmp_path / "c" and named.iteration == 3
    without = Trainer(**{**given, "model": sd3_small()}, resume=str(tmp_path / "a"))
    assert without.folder == tmp_path / "a" and without.recipe.train.iterations == 1


def test_a_run_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    recipe = settings(run={"dir": str(tmp_path / "runs/new")})
    for resume, words in (
        (str(tmp_path / "nowhere"), r"nowhere' holds no run to go on with"),
        ("last", r"resume = 'last': .*holds no run"),
        (True, r"holds no checkpoint to go on from"),
    ):
        with pytest.raises(UserError, match=words):
            Trainer(
                model=sd3_small(),
                reward_funcs=brightness,
                train_dataset=PROMPTS,
                recipe=recipe,
                resume=resume,  # pyright: ignore[reportArgumentType]
            )
    with pytest.raises(UserError, match=r"nowhere' holds no run to go on with"):
        Trainer.from_run(tmp_path / "nowhere")


def test_the_weights_that_are_saved_can_be_chosen(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", train={"iterations": 3}, ema={"decay": 0.9, "every": 1})
    run.train()
    saved = {}
    for weights in ("slow", "policy", "old"):
        run.save_model(tmp_path / weights, weights)  # pyright: ignore[reportArgumentType]
        saved[weights] = load_file(tmp_path / weights / "pytorch_lora_weights.safetensors")
    named = run.policy.parameters()
    assert len(saved["policy"]) == len(named)
    same = {
        (a, b): all(torch.equal(saved[a][name], saved[b][name]) for name in saved[a])
        for a, b in (("slow", "policy"), ("old", "policy"), ("old", "slow"))
    }
    assert not any(same.values()), same
    run.save_model(tmp_path / "default")
    default = load_file(tmp_path / "default/pytorch_lora_weights.safetensors")
    assert all(torch.equal(default[name], saved["slow"][name]) for name in default)
    gradient = trainer(tmp_path / "other", algorithm=FlowGRPO(updates=1))
    with pytest.raises(UserError, match=r"save_model\(weights='old'\): flow_grpo keeps no old"):
        gradient.save_model(tmp_path / "no", "old")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("learning_rate", r"Trainer\(learning_rate=...\): no such argument.*train\.lr"),
        ("callback", r"no such argument"),
    ],
)
def test_an_argument_that_is_none_is_refused(name: str, words: str, tmp_path: Path) -> None:
    arguments: Any = {name: 3}
    with pytest.raises(UserError, match=words):
        Trainer(model=sd3_small(), **arguments)
