"""Callbacks: what they see, what they may ask for, and what becomes of their errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dgpo import Callback
from dgpo.distributed.processes import Processes
from dgpo.errors import UserError
from dgpo.recipe import Recipe
from dgpo.trainer import Trainer
from dgpo.training.callbacks import Callbacks, TrainerState
from dgpo.training.routine import Outputs, routine
from families.tiny import sd3_small
from tiny_runs import PROMPTS, brightness, light, rows, settings, trainer

HOOKS = [name for name in vars(Callback) if name.startswith("on_")]


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


class Notes(Callback):
    """Writes down every hook, with what it was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, dict[str, Any]]] = []

    def __getattribute__(self, name: str) -> Any:
        if name not in HOOKS:
            return super().__getattribute__(name)
        return lambda state, control, **what: self.seen.append((name, state.iteration, what))


def test_every_hook_is_called_in_order(tmp_path: Path) -> None:
    notes = Notes()
    run = trainer(
        tmp_path,
        callbacks=[notes],
        eval_dataset=PROMPTS[:2],
        eval={"every": 1, "at_start": True},
        checkpoint={"every": 1, "keep_best": 0},
    )
    run.train()
    iteration = ["on_iteration_begin", "on_rollout", "on_log", "on_iteration_end"]
    assert [name for name, *_ in notes.seen] == [
        "on_train_begin",
        "on_evaluate",
        *iteration,
        "on_evaluate",
        "on_save",
        *iteration,
        "on_train_end",
        "on_evaluate",
        "on_save",
    ]
    assert [done for name, done, _ in notes.seen if name == "on_iteration_end"] == [1, 2]
    logged = [what["row"] for name, _, what in notes.seen if name == "on_iteration_end"]
    assert logged == rows(tmp_path)
    report = notes.seen[-2][2]["report"]
    assert report.overall == rows(tmp_path, "evaluations.jsonl")[-1]["overall"]


def test_a_rollout_is_shown_with_rewards_and_advantages(tmp_path: Path) -> None:
    notes = Notes()
    run = trainer(tmp_path, callbacks=[notes], train={"iterations": 1})
    run.train()
    (what,) = (what for name, _, what in notes.seen if name == "on_rollout")
    assert set(what) == {"images", "prompts", "rewards", "advantages"}
    assert len(what["images"]) == len(what["prompts"]) == len(what["advantages"]) == 8
    chosen = [prompt.text for prompt in run.sampler.at(0) for _ in range(4)]
    assert what["prompts"] == chosen
    (name,) = what["rewards"]
    assert name == "brightness"
    mean = float(what["rewards"][name].mean())
    assert mean == pytest.approx(rows(tmp_path)[0]["reward_mean"], rel=1e-6)
    groups = what["advantages"].view(2, 4)
    assert torch.allclose(groups.sum(1), torch.zeros(2), atol=1e-3) and bool((groups != 0).all())


def test_groups_without_spread_and_lost_ones_have_such_advantages(tmp_path: Path) -> None:
    def reward(images: Any, prompts: list[str]) -> list[float]:
        if PROMPTS[1] in prompts:
            raise ValueError("no answer")
        return [1.0] * len(images)

    notes = Notes()
    run = trainer(
        tmp_path,
        {reward: {"on_error": "skip_group"}},
        callbacks=[notes],
        train_dataset=PROMPTS[:2],
        train={"iterations": 1},
    )
    run.data.rewards.trial = lambda *given: None  # pyright: ignore
    with pytest.warns(UserWarning, match="no answer"):
        run.train()
    (what,) = (what for name, _, what in notes.seen if name == "on_rollout")
    lost = torch.tensor([text == PROMPTS[1] for text in what["prompts"]])
    assert bool(what["advantages"][lost].isnan().all())
    assert bool((what["advantages"][~lost] == 0).all())


class Asks(Callback):
    """Asks for something after the first iteration."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_iteration_end(self, state: Any, control: Any, row: Any, **what: Any) -> None:
        if row["iteration"] == 1:
            setattr(control, self.what, True)


def test_a_callback_may_ask_for_an_evaluation_a_checkpoint_or_the_end(tmp_path: Path) -> None:
    for what in ("should_evaluate", "should_save", "should_stop"):
        run = trainer(
            tmp_path / what,
            callbacks=[Asks(what)],
            eval_dataset=PROMPTS[:2],
            train={"iterations": 3},
        )
        run.train()
    evaluated = {
        what: [row["iteration"] for row in rows(tmp_path / what, "evaluations.jsonl")]
        for what in ("should_evaluate", "should_save", "should_stop")
    }
    # the best score of all makes a checkpoint, so that the first evaluation saves as well
    assert evaluated == {"should_evaluate": [1, 3], "should_save": [3], "should_stop": [1]}
    saved = sorted(p.name for p in (tmp_path / "should_save/checkpoints").iterdir())
    assert saved == ["00000001", "00000003"]
    assert len(rows(tmp_path / "should_stop")) == 1
    assert (tmp_path / "should_stop/README.md").exists()


def test_the_state_is_read_only(tmp_path: Path) -> None:
    class Writes(Callback):
        def on_train_begin(self, state: Any, control: Any, **what: Any) -> None:
            assert state.is_main_process and state.folder == tmp_path
            assert state.recipe.group_size == 4 and state.log_history == []
            state.iteration = 7

    run = trainer(tmp_path, callbacks=[Writes()])
    with pytest.raises(UserError, match=r"callback Writes\.on_train_begin.*state\.iteration is"):
        run.train()
    assert run.iteration == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ValueError("no"),
            r"callback Bad\.on_log raised ValueError: no \(test_callbacks\.py, line",
        ),
        (UserError("set X"), r"callback Bad\.on_log: set X"),
    ],
)
def test_an_error_of_a_callback_is_told_with_its_name(
    error: Exception, words: str, tmp_path: Path
) -> None:
    class Bad(Callback):
        def on_log(self, state: Any, control: Any, **what: Any) -> None:
            raise error

    with pytest.raises(UserError, match=words) as found:
        trainer(tmp_path, callbacks=[Bad()]).train()
    assert found.value.__cause__ is error


def test_callbacks_are_named_in_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dgpo import Callback\n"
        "class Counts(Callback):\n"
        "    def on_iteration_end(self, state, control, **what):\n"
        "        (state.folder / 'counted').write_text(str(state.iteration))\n"
        "class Wants(Callback):\n"
        "    def __init__(self, number): ...\n"
        "class Other: ...\n"
    )

    def named(name: str) -> Trainer:
        given: Any = {"dir": str(tmp_path / name), "callbacks": [f"{file}:{name}"]}
        return Trainer(
            model=sd3_small(),
            reward_funcs=brightness,
            train_dataset=PROMPTS,
            recipe=settings(run=given),
        )

    run = named("Counts")
    assert Recipe.from_dict(run.recipe.to_dict()) == run.recipe
    run.train()
    assert (tmp_path / "Counts/counted").read_text() == "2"
    for name, words in (
        ("Wants", r"Wants'.*takes arguments is given as an object"),
        ("Other", r"Other is no callback; derive the class from dgpo\.Callback"),
        ("Missing", r"has no 'Missing'"),
    ):
        with pytest.raises(UserError, match=words):
            named(name)


@pytest.mark.parametrize("given", [3, [3], [Callback, "name"], "json:loads"])
def test_what_is_no_callback_is_refused(given: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="callback"):
        trainer(tmp_path, callbacks=given)


def test_a_class_or_a_single_object_will_do(tmp_path: Path) -> None:
    named = "dgpo.training.callbacks:Callback"
    for given in (Callback, Callback(), [Callback, Notes()], named, (c for c in [Notes()])):
        assert all(
            isinstance(one, Callback) for one in trainer(tmp_path, callbacks=given).callbacks
        )


class _Second(Processes):
    """One of two processes; the other has asked for something."""

    other: dict[str, Any]

    def all_gather_object(self, value: Any, what: str) -> list[Any]:
        return [value, json.loads(json.dumps({**value, **self.other}))]


def test_what_one_process_asks_for_all_do(tmp_path: Path) -> None:
    two = _Second(0, 2)
    hooks = Callbacks(TrainerState(Recipe()), two)
    two.other = {"should_save": True, "deliver": "best", "reason": "why"}
    hooks.agree()
    control = hooks.control
    assert control.should_save and not control.should_stop and not control.should_evaluate
    assert control.deliver == "best" and control.reason == "why"


def test_what_is_written_comes_before_users_and_what_they_ask_for_after_them() -> None:
    user, tools = Notes(), type("Tools", (), {"processes": Processes()})()
    for name in ("held_out", "checkpoints", "updater", "collector", "rewards"):
        setattr(tools, name, None)
    outputs: Any = Outputs(Recipe(), None, main=False)
    names = [type(one).__name__ for one in routine([user], TrainerState(Recipe()), outputs, tools)]
    assert names == [
        "Limits",
        "Records",
        "RunGuards",
        "ProgressLine",
        "Notes",
        "Evaluation",
        "Checkpointing",
        "Grids",
        "Card",
    ]
