"""The protocol: every hook of a reward is heard, however it is given and whatever is around it."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image
from torch import nn

from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.rewards import Reward, load_rewards
from dgpo.rewards.offload import networks
from dgpo.rewards.reward import FACTS, HOOKS, as_reward
from dgpo.rewards.shipped.video import PerFrame
from dgpo.rewards.wrappers import Lazy, Ranked, Wrapper

NETWORK = nn.Linear(1, 1)
IMAGES = [Image.new("RGB", (4, 4), color) for color in ("black", "white")]
TEXTS = ["a cat", "a red dog"]
COLUMNS = {"text": ["1", "2"]}


class Foreign:
    """Has every hook and is no subclass of Reward, as a class of a user's own module."""

    media = "sounds"
    group_wise = False
    asks_people = True
    of_set = True

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def __call__(self, images: Any, prompts: Any, text: Any = None) -> list[float]:
        self.heard.append(("call", images, prompts, text))
        return [float(len(prompt)) for prompt in prompts]

    def alone(self, images: Any, prompts: Any, **columns: Any) -> list[float]:
        self.heard.append(("alone", images, prompts, columns))
        return [7.0] * len(images)

    def announce(self, images: Any, prompts: Any, **columns: Any) -> None:
        self.heard.append(("announce", images, prompts, columns))

    def check(self, prompts: Any) -> None:
        self.heard.append(("check", prompts))

    def run_in(self, folder: Path) -> None:
        self.heard.append(("run_in", folder))

    def close(self) -> None:
        self.heard.append(("close",))

    def modules(self) -> list[nn.Module]:
        self.heard.append(("modules",))
        return [NETWORK]


class Everything(Foreign, Reward):
    """The same as a reward of this library."""

    name = "everything"
    columns = frozenset({"text"})
    needs = frozenset({"text"})


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "alone": ((IMAGES, TEXTS), COLUMNS),
    "announce": ((IMAGES, TEXTS), COLUMNS),
    "check": (([Prompt("a cat")],), {}),
    "run_in": ((Path("run"),), {}),
    "close": ((), {}),
    "modules": ((), {}),
}
"""How each hook is called that is no fact."""


def lazy(inner: Reward) -> Lazy:
    made = Lazy(type(inner))
    made.inner = inner
    return made


WRAPPERS: dict[str, Any] = {
    "Wrapper": Wrapper,
    "Ranked": Ranked,
    "PerFrame": PerFrame,
    "Lazy": lazy,
}
OWN = {
    "Ranked": {"name", "group_wise"},
    "PerFrame": {"name", "media", "group_wise", "alone", "announce"},
}
"""What a wrapper is or does itself."""


def test_nothing_is_missing_in_these_tables() -> None:
    """A new hook or wrapper ends here, until the tests below know it."""
    assert set(HOOKS) == set(FACTS) | CALLS.keys()
    assert set(HOOKS) <= vars(Foreign).keys() | vars(Everything).keys()
    kinds = {kind.__name__ for kind in Wrapper.__subclasses__() if kind.__module__[:4] == "dgpo"}
    assert kinds | {"Wrapper"} == set(WRAPPERS)


def unusual(kind: type, hook: str) -> Any:
    """A reward whose fact is none that a default or another reward has."""
    return type(kind.__name__, (kind,), {hook: "unusual"} if hook in FACTS else {})()


def assert_heard(outer: Reward, inner: Any, hook: str) -> None:
    """What the outer one says of a hook is what the inner one says."""
    if hook in FACTS:
        assert getattr(outer, hook) == "unusual"
        return
    given, columns = CALLS[hook]
    inner.heard.clear()
    wanted = getattr(inner, hook)(*given, **columns)
    assert getattr(outer, hook)(*given, **columns) == wanted
    first, second = inner.heard
    assert first == second and first[0] == hook


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_a_wrapper_does_not_say_itself_the_reward_inside_says(wrapper: str, hook: str) -> None:
    if hook not in OWN.get(wrapper, set()):
        inner = unusual(Everything, hook)
        assert_heard(WRAPPERS[wrapper](inner), inner, hook)
        assert_heard(Wrapper(WRAPPERS[wrapper](inner)), inner, hook)


@pytest.mark.parametrize("hook", sorted(set(HOOKS) - {"name", "columns", "needs"}))
def test_an_object_of_a_foreign_class_keeps_every_hook(hook: str) -> None:
    inner = unusual(Foreign, hook)
    assert_heard(as_reward(inner), inner, hook)


def test_name_and_columns_of_a_foreign_class_are_not_its_attributes() -> None:
    class Table(Foreign):
        name, columns = "a table", ("a", "b")

    class Named(Foreign):
        __name__ = "own"

    assert as_reward(Table()).name == "Table" and as_reward(Table()).columns == {"text"}
    assert as_reward(Named()).name == "own"
    assert as_reward(Table).name == "Table", "a class is made into its object"


def test_a_function_may_have_hooks_too() -> None:
    heard = []

    def best(images: Any, prompts: Any) -> list[float]:
        return [1.0, 0.0]

    best.group_wise, best.check = True, heard.append
    reward = as_reward(best)
    reward.check([])
    assert (reward.name, reward.group_wise, heard) == ("best", True, [[]])
    assert reward.media == "pictures" and list(reward.modules()) == []


@pytest.mark.parametrize("kind", [Everything, Foreign])
@pytest.mark.parametrize(
    "settings",
    [{}, {"rank": True}, {"timeout": 9.0, "retries": 1}, {"rank": True, "timeout": 9.0}],
)
def test_a_set_asks_every_hook_whatever_the_settings(kind: Any, settings: Any) -> None:
    inner = kind()
    rewards = load_rewards({inner: settings})
    name = rewards.names[0]
    assert name == {Everything: "everything", Foreign: "Foreign"}[kind]
    assert rewards.media == "sounds"
    assert rewards.names_with("asks_people") == [name]
    assert rewards.names_with("group_wise") == [name] * bool(settings.get("rank"))
    rows = [
        Prompt(text, {"text": mark, "other": 1}) for text, mark in zip(TEXTS, "12", strict=True)
    ]
    rewards.offload()
    rewards.run_in(Path("run"))
    rewards.load()
    rewards.check(rows)
    rewards.trial(IMAGES, rows)  # people are not asked
    rewards.announce(IMAGES, rows, [0, 0])
    scored = rewards.score(IMAGES, rows, [0, 0]).by_name[name].tolist()
    assert scored == ([0.0, 1.0] if settings.get("rank") else [5.0, 9.0])
    assert rewards(IMAGES, rows).total.tolist() == [7.0, 7.0]
    rewards.close()
    heard = [one for one in inner.heard if one != ("modules",)]
    assert heard == [
        ("run_in", Path("run")),
        ("check", []),
        ("check", rows),
        ("announce", IMAGES, TEXTS, {**COLUMNS, "other": [1, 1]}),
        ("call", IMAGES, TEXTS, ["1", "2"]),
        ("alone", IMAGES, TEXTS, COLUMNS),
        ("close",),
    ]
    assert ("modules",) in inner.heard


def test_a_video_is_its_frames_to_every_hook() -> None:
    inner = Everything()
    outer = PerFrame(inner)
    videos = [IMAGES, IMAGES[:1]]
    outer.announce(videos, TEXTS, **COLUMNS)
    frames, texts = [*IMAGES, IMAGES[0]], [TEXTS[0], TEXTS[0], TEXTS[1]]
    asked = (frames, texts, {"text": ["1", "1", "2"]})
    assert inner.heard == [("announce", *asked)]
    assert outer(videos, TEXTS, **COLUMNS) == outer.alone(videos, TEXTS, **COLUMNS) == [7.0, 7.0]
    assert inner.heard[1:] == [("alone", *asked)] * 2
    assert outer.media == "videos" and not PerFrame(Ranked(inner)).group_wise


def test_a_lazy_reward_is_not_built_for_what_its_class_says_or_for_nothing() -> None:
    class Loud(Everything):
        built: ClassVar[list[Any]] = []

        def __init__(self) -> None:
            super().__init__()
            self.built.append(self)

    reward = Lazy(Loud)
    rewards = load_rewards(reward)
    assert rewards.names == ["Loud"] and rewards.media == "sounds"
    assert rewards.names_with("asks_people") == ["Loud"] and reward.columns == {"text"}
    rewards.run_in(Path("run"))
    rewards.close()
    assert networks([reward]) == [] and Loud.built == []
    rewards.load()
    assert len(Loud.built) == 1 and Loud.built[0].heard == [("run_in", Path("run")), ("check", [])]
    rewards.close()
    assert networks([reward]) == [NETWORK] and ("close",) in Loud.built[0].heard


def test_a_subclass_gets_the_columns_that_it_names_and_its_own_name() -> None:
    class Short(Reward):
        def __call__(self, images: Any, prompts: Any, text: Any = None) -> list[float]:
            return [float(len(one)) for one in text]

    class Any_(Short):
        name = "any"
        columns = None

        def __call__(self, images: Any, prompts: Any, **columns: Any) -> list[float]:
            return [float(len(columns))] * len(images)

    rows = [Prompt("a", {"text": "abc", "k": 1})]
    assert load_rewards([Short(), Any_()])(IMAGES[:1], rows).by_name == {"Short": 3.0, "any": 2.0}
    assert load_rewards(Short).names == ["Short"]
    with pytest.raises(UserError, match=r"'Bad' must take \(images, prompts"):

        class Bad(Reward):
            def __call__(self, images: Any) -> list[float]:
                return []


def test_what_is_not_written_says_so() -> None:
    class Empty(Reward):
        pass

    with pytest.raises(UserError, match="Empty does not say how it scores"):
        load_rewards(Empty())(IMAGES, [Prompt("a")] * 2)
    with pytest.raises(UserError, match="'Empty' compares the pictures of a group"):

        class Groups(Empty):
            name = "Empty"
            group_wise = True

        load_rewards(Groups())(IMAGES, [Prompt("a")] * 2)


@pytest.mark.parametrize(
    "module",
    [
        "rewards",
        "rewards.reward",
        "rewards.set",
        "rewards.wrappers",
        "rewards.loading",
        "rewards.shipped.geneval_judge",
        "ranking.answers",
    ],
)
def test_the_examples_in_the_docstrings(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"dgpo.{module}"))
    assert found.attempted and not found.failed
