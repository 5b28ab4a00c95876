"""A user's algorithm that answers something else than what it was asked for: one clear error."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import Tensor

from dgpo.algorithms import Algorithm
from dgpo.core.groups import Groups
from dgpo.core.points import Forward
from dgpo.errors import UserError
from dgpo.recipe import Recipe
from tiny_runs import TIMESTEPS, light, rows, trainer


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


class Push(Algorithm):
    name: ClassVar[str] = "push"
    answer: ClassVar[Callable[[Tensor, Forward], Any]] = lambda loss, points: (loss, {})
    made: ClassVar[Callable[[Tensor], Any]] = lambda advantages: advantages

    def advantages(self, rewards: Tensor, groups: Groups) -> Tensor:
        return type(self).made(groups.normalize(rewards, "group", eps=1e-4))

    def loss(self, points: Forward) -> Any:
        return type(self).answer((points.advantages * points.error(points.pred)).mean(), points)


def run(folder: Path, **own: Any) -> None:
    kind: Any = type("Push", (Push,), own)
    trainer(folder, algorithm=kind(timesteps=TIMESTEPS), train={"iterations": 1}).train()


PAIR = (
    "; it must return a pair, the loss and a dict of figures: return loss, {} (or "
    "{'error': error.detach().mean()})"
)
SCALAR = (
    " as the loss; it must be a tensor of one float without dimensions, the mean over the samples: "
    "loss.mean()"
)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda loss, points: None, f"returned None{PAIR}"),
        (lambda loss, points: loss, f"returned a tensor of float32 of shape []{PAIR}"),
        (
            lambda loss, points: (loss.detach().numpy(), {}),
            f"returned numpy.ndarray of shape []{SCALAR}",
        ),
        (lambda loss, points: (0.5, {}), f"returned float 0.5{SCALAR}"),
        (
            lambda loss, points: (points.error(points.pred), {}),
            f"returned a tensor of float32 of shape [8]{SCALAR}",
        ),
        (lambda loss, points: (loss.long(), {}), f"returned a tensor of int64 of shape []{SCALAR}"),
        (
            lambda loss, points: (loss.detach(), {}),
            "returned a loss without a gradient, from which nothing can be learned; compute it "
            "with torch from points.pred, without detach(), numpy or torch.no_grad()",
        ),
        (
            lambda loss, points: (loss, {"error": None}),
            "returned the figure 'error' as None; a figure is one number under a text: "
            "error.detach().mean()",
        ),
        (
            lambda loss, points: (loss, {"reward_mean": 1.0}),
            "returned a figure 'reward_mean', which the run itself writes down; give it another "
            "name",
        ),
        (
            lambda loss, points: points.snapshot("ref"),
            "raised ValueError: ",
        ),
    ],
)
def test_a_loss_that_is_none(answer: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"algorithm Push.loss {words}")):
        run(tmp_path / "run", answer=answer)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda found: None, "returned None; it must return a tensor of floats of shape [8], one "
         "for each of rewards"),
        (lambda found: found.numpy(), "returned numpy.ndarray of shape [8]; it must return"),
        (lambda found: found[:, None], "returned a tensor of float32 of shape [8, 1]; it must"),
        (lambda found: found.long(), "returned a tensor of int64 of shape [8]; it must return"),
        (lambda found: found / 0, "returned -inf for the reward "),
        (lambda found: found.no_such(), "raised AttributeError: 'Tensor' object has no attribute "
         "'no_such' (test_asking.py, line "),
    ],
)  # fmt: skip
def test_advantages_that_are_none(made: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"algorithm Push.advantages {words}")):
        run(tmp_path / "run", made=made)


def test_figures_may_be_plain_numbers(tmp_path: Path) -> None:
    run(tmp_path / "run", answer=lambda loss, points: (loss, {"pushed": 2}))
    assert rows(tmp_path / "run")[0]["pushed"] == 2


def test_weights_that_are_none(tmp_path: Path) -> None:
    words = (
        "algorithm Push.weights returned None; it must return a tensor of floats of shape [8], one "
        "for each of points.advantages"
    )
    kind: Any = type("Push", (Push,), {"weights": lambda self, points: None})
    with pytest.raises(UserError, match=re.escape(words)):
        trainer(
            tmp_path / "run",
            algorithm=kind(timesteps=TIMESTEPS),
            train={"micro_batch": 3},
        ).train()


def test_a_class_that_is_not_finished(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dgpo.algorithms import Algorithm\n"
        "class Half(Algorithm):\n"
        "    name = 'half'\n"
        "    def advantage(self, rewards, groups): ...\n"
        "    def loss(self, points): ...\n"
        "class Nameless(Algorithm):\n"
        "    def advantages(self, rewards, groups): ...\n"
        "    def loss(self, points): ...\n"
    )
    for name, words in (
        ("Half", "algorithm Half has no method 'advantages' (did you mean 'advantage'?); write it"),
        (
            "Nameless",
            "algorithm Nameless has no name; give it one in the class: name: ClassVar[str] = "
            "'nameless'",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            Recipe.from_dict({"algorithm": f"{file}:{name}"})
    assert isinstance(Recipe.from_dict({"algorithm": Push}).algorithm, Push)
    with pytest.raises(UserError, match=r"algorithm\.name = Path: .* is not a dgpo\.algorithms"):
        Recipe.from_dict({"algorithm": Path})
