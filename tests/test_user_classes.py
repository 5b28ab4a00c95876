"""What users' classes and functions are refused for: the exact message, before anything is paid."""

from __future__ import annotations

import math
import re
from typing import Any

import diffusers
import pytest
import torch

from dgpo import Callback
from dgpo.errors import UserError
from dgpo.evaluation.metrics import Metrics
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.self_check import self_check
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.prompts import Prompt, load_prompts
from dgpo.rewards import load_rewards
from dgpo.run.loggers import Logger
from dgpo.run.loggers.composite import make_loggers
from dgpo.training.callbacks import make_callbacks
from families.tiny import sd3_small


class NoWhat(Callback):
    def on_iteration_end(self, state: Any, control: Any) -> None: ...  # pyright: ignore


class NoColumns(Callback):
    def on_rollout(self, state: Any, control: Any, images: Any) -> None: ...  # pyright: ignore


class NoMethod(Callback):
    on_log: Any = 3


class Whole(Callback):
    def on_train_begin(self, state: Any, control: Any) -> None: ...  # pyright: ignore
    def on_log(self, state: Any, control: Any, row: Any, **what: Any) -> None: ...
    def on_save(self, *given: Any, **what: Any) -> None: ...

    @staticmethod
    def on_evaluate(state: Any, control: Any, **what: Any) -> None: ...  # pyright: ignore


class Breaks(Callback):
    def __init__(self) -> None:
        raise RuntimeError("no")


class OneHand(Logger):
    def scalars(self, values: Any) -> None: ...  # pyright: ignore


class NoDisk(Logger):
    def __init__(self) -> None:
        raise OSError("no disk")


class NoModel:
    def __init__(self) -> None:
        raise KeyError("weights")

    def __call__(self, images: Any, prompts: Any) -> Any: ...


HERE = "test_user_classes"
EULER = diffusers.FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            NoWhat,
            "callbacks: NoWhat.on_iteration_end(self, state: 'Any', control: 'Any') -> 'None': got "
            "an unexpected keyword argument 'row'; write def on_iteration_end(self, state, "
            "control, **what)",
        ),
        (NoColumns, "'prompts'; write def on_rollout(self, state, control, **what)"),
        (NoMethod, "callbacks: NoMethod.on_log is no method; write def on_log(self, state, "),
        (Breaks, "callbacks: making Breaks raised RuntimeError: no (test_user_classes.py, line "),
    ],
)
def test_callbacks(kind: Any, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        make_callbacks(kind, "callbacks")
    assert len(make_callbacks([Whole, Whole()], "callbacks")) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("OneHand", "too many positional arguments; write def scalars(self, values, step)"),
        ("NoDisk", f"run.loggers: '{HERE}:NoDisk': making NoDisk raised OSError: no disk ("),
    ],
)
def test_loggers(name: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        make_loggers([f"{HERE}:{name}"])


def test_a_reward_whose_constructor_raises() -> None:
    with pytest.raises(
        UserError, match=r"rewards\.mine: making NoModel raised KeyError: 'weights'"
    ):
        load_rewards({"mine": {"use": f"{HERE}:NoModel"}})


class NoSampler(EULER):
    def __init__(self, **settings: Any) -> None:
        raise KeyError("x")


class NoStep(EULER):
    def step(self, *given: Any, **named: Any) -> Any:
        return None


class NanStep(EULER):
    def step(self, *given: Any, **named: Any) -> Any:
        return (super().step(*given, **named)[0] * math.nan,)


def test_a_sampler_that_cannot_be_made() -> None:
    words = f"rollout.scheduler: '{HERE}:NoSampler': making NoSampler raised KeyError: 'x' ("
    with pytest.raises(UserError, match=re.escape(words)):
        make_scheduler(f"{HERE}:NoSampler", sd3_small().scheduler)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NoStep", "sampler NoStep failed when it was tried out: AttributeError: 'NoneType' "),
        (
            "NanStep",
            "sampler NanStep: its step 0 makes samples that are not finite, of predictions that "
            "are",
        ),
    ],
)
def test_a_sampler_is_blamed_by_its_name(name: str, words: str) -> None:
    pipe = sd3_small()
    model = PipelineModel(pipe, call={"height": 16, "width": 16})
    sampler = make_scheduler(f"{HERE}:{name}", pipe.scheduler)
    with pytest.raises(UserError, match=re.escape(words)), torch.no_grad():
        self_check(model, samplers=[sampler])


def text() -> str:
    return "a cat"


def table() -> dict[str, list[str]]:
    return {"prompt": ["a cat"]}


def test_a_prompts_function() -> None:
    for name, shown in (("text", "'a cat'"), ("table", "{'prompt': ['a cat']}")):
        words = f"{HERE}:{name}: {shown} holds no rows; give texts or dicts with 'prompt'"
        with pytest.raises(UserError, match=re.escape(words)):
            load_prompts(f"{HERE}:{name}")


ANSWERS: list[Any] = []


def of_set(images: Any, prompts: Any, tag: Any, image: Any) -> Any:
    ANSWERS[1:] = [tag, image]
    return ANSWERS[0]


of_set.of_set = True  # pyright: ignore


@pytest.mark.parametrize("answer", [None, 0.5, (1, 2), ("a", 2, 3), (math.nan, 0, 1), "abc"])
def test_a_metric_of_a_whole_set(answer: Any) -> None:
    ANSWERS[:] = [answer]
    rows = load_prompts([{"prompt": "a", "tag": "x"}])
    words = (
        f"metric 'of_set' returned {answer!r}; a metric of a whole set returns (value, low, high), "
        "three finite numbers"
    )
    with pytest.raises(UserError, match=re.escape(words)):
        Metrics([_with_tag]).of_set([_picture()], rows)


def _with_tag(images: Any, prompts: Any, tag: Any) -> Any:
    return ANSWERS[0]


_with_tag.of_set = True  # pyright: ignore
_with_tag.__name__ = "of_set"


def test_a_metric_of_a_whole_set_is_given_what_rewards_are_given() -> None:
    from dgpo.prompts.caption import Caption

    ANSWERS[:] = [(0.5, 0, 1)]
    picture = _picture()
    rows = [Prompt(Caption("a", {"image": picture}), {"image": "a.png"}), Prompt("b", {"tag": "x"})]
    found = Metrics([of_set]).of_set([picture, picture], rows)
    assert found["of_set"] == (0.5, 0, 1)
    tags, pictures = ANSWERS[1:]
    assert tags == [None, "x"]
    assert pictures[0].size == (8, 8) and pictures[1] is None


def _picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (8, 8), "red")
