"""Code that is not ours cannot reach what we compute: what it changes is put back, and it has
copies."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dgpo import user_code as guard
from dgpo.errors import UserError, told
from dgpo.models.load import load_pipeline
from dgpo.prompts import Prompt, load_prompts
from dgpo.registry import resolve
from dgpo.rewards import Reward, RewardFailure, load_rewards
from dgpo.rewards.scoring import Scoring
from dgpo.training.callbacks import Callback, make_callbacks
from dgpo.user_code import disturbs, own, user_code
from families.tiny import sd3_small
from tiny_runs import TIMESTEPS, Spy, light, rows, trainer, without_times

KEPT: list[Any] = []
"""What was entered and never left, as in a script that keeps it."""


def entered(block: Any) -> None:
    block.__enter__()
    KEPT.append(block)


CHANGES: dict[str, Callable[[], Any]] = {
    "the grad mode": lambda: torch.set_grad_enabled(False),
    "inference mode": lambda: entered(torch.inference_mode()),
    "autocast": lambda: entered(torch.autocast("cpu")),
    "the default device": lambda: torch.set_default_device("meta"),
    "numpy's handling of errors": lambda: np.seterr(all="raise"),
    "the handlers of Ctrl-C and SIGTERM": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "the default dtype": lambda: torch.set_default_dtype(torch.float64),
    "the number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "the deterministic mode": lambda: torch.use_deterministic_algorithms(True),
    "the flags of cuDNN": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "the precision of float32 (TF32)": lambda: torch.set_float32_matmul_precision("high"),
    "the current folder": lambda: os.chdir("/"),
}
SHARED = list(CHANGES)[6:]


def reseed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def everything() -> list[Any]:
    return [
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.ones(1).device,
        torch.is_autocast_enabled("cpu"), np.geterr(), signal.getsignal(signal.SIGTERM),
        torch.get_default_dtype(), torch.get_num_threads(), torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32, os.getcwd(),
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def nobody_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_told", set())


@pytest.mark.parametrize("name", CHANGES)
def test_what_user_code_changes_is_put_back_and_told_once(name: str) -> None:
    before = everything()
    with pytest.warns(UserWarning) as heard:
        for _ in range(3):
            with user_code("reward 'x'"):
                CHANGES[name]()
                if name == "inference mode":
                    assert torch.is_inference_mode_enabled()
                else:
                    assert everything() != before
            assert everything() == before
    said = str(heard[0].message)
    assert len(heard) == 1 and said.startswith("reward 'x' changed ")
    assert name in said and said.endswith("; put back")
    assert disturbs("reward 'x'") == (name in SHARED) and not disturbs("reward 'y'")


def test_every_change_at_once_is_one_line_past_all_filters() -> None:
    before = everything()
    with warnings.catch_warnings(record=True) as heard:
        with pytest.raises(ValueError, match="mine"), user_code("reward 'x'"):
            warnings.simplefilter("ignore")
            for change in CHANGES.values():
                change()
            raise ValueError("mine")
        with user_code("reward 'x'"):
            torch.set_default_dtype(torch.float64)
    assert everything() == before
    assert len(heard) == 1 and all(name in str(heard[0].message) for name in SHARED)


def test_what_was_off_before_is_off_in_the_block_and_after_it() -> None:
    with torch.no_grad():
        with user_code("x"):
            assert not torch.is_grad_enabled()
        with pytest.warns(UserWarning, match="the grad mode"), user_code("x"):
            torch.set_grad_enabled(True)
        assert not torch.is_grad_enabled()
    with torch.inference_mode(), user_code("x"):
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()


def test_two_threads_put_back_what_was_before_both() -> None:
    """The second begins in the changed state of the first, and ends after it."""
    changed, begun, ended = (threading.Event() for _ in range(3))

    def first() -> None:
        with user_code("reward 'first'"):
            torch.set_default_dtype(torch.float64)
            changed.set()
            begun.wait(5)
        ended.set()

    thread = threading.Thread(target=first)
    with pytest.warns(UserWarning, match="'first' changed the default dtype") as heard:
        thread.start()
        changed.wait(5)
        with user_code("callback Second"):
            begun.set()
            ended.wait(5)
        thread.join()
    assert torch.get_default_dtype() == torch.float32
    # who changed it cannot be told apart while both run
    assert sorted(str(one.message).split()[0] for one in heard) == ["callback", "reward"]


def test_global_random_streams_are_the_users_and_go_on() -> None:
    def drawn() -> list[float]:
        with user_code("x"):
            return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seed() -> None:
        with user_code("x"):
            reseed()

    seed()
    first, second = drawn(), drawn()
    assert not set(first) & set(second)
    seed()
    assert drawn() == first


def test_what_is_no_exception_is_one() -> None:
    for error in (asyncio.CancelledError("gone"), BaseException("base")):
        word = f"{type(error).__name__}: {error}"
        with pytest.raises(RuntimeError, match=word) as raised, user_code("x"):
            raise error
        assert "(test_user_code.py, line" in told(raised.value)
    for stop in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stop), user_code("x"):
            raise stop


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_error_without_a_readable_message_is_told() -> None:
    assert told(Mute()) == "Mute: its message cannot be read (RuntimeError)"


# ------------------------------------------------------------------ where user code is called

RED, BLUE = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
IMAGES, GROUPS = [RED, BLUE] * 2, [0, 0, 1, 1]
ROWS = [Prompt(f"p{row}", {"tags": ["a"], "box": {"x": [1]}}) for row in range(4)]
FILE = """
import os, torch
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
os.chdir("/")

def made():
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_grad_enabled(False)
    return MADE
"""


@pytest.mark.parametrize(
    ("kind", "made", "use"),
    [
        ("reward", "[]", lambda name: resolve("reward", name)),
        ("prompts", "iter(['a cat', 'a dog'])", load_prompts),
        ("model", "__import__('families.tiny').tiny.sd3_small()", load_pipeline),
    ],
)
def test_files_and_their_functions(kind: str, made: str, use: Any, tmp_path: Path) -> None:
    file = tmp_path / f"{kind}.py"
    file.write_text(FILE.replace("MADE", made))
    before = everything()
    with pytest.warns(UserWarning, match=rf"{kind} '.*:made' changed the grad mode"):
        assert use(f"{file}:made") is not None
    assert everything() == before


class Loose(Callback):
    def __init__(self) -> None:
        torch.set_num_threads(torch.get_num_threads() + 1)

    def on_rollout(self, state: Any, control: Any, **what: Any) -> None:
        torch.set_grad_enabled(False)
        what["rewards"].clear()
        what["advantages"].zero_()

    def on_iteration_end(self, state: Any, control: Any, *, row: Any, **what: Any) -> None:
        entered(torch.inference_mode())
        row.clear()


def test_a_callback_is_made_in_the_guard_too() -> None:
    before = everything()
    with pytest.warns(UserWarning, match="callback Loose changed the number of threads"):
        make_callbacks(Loose, "callbacks")
    assert everything() == before


def test_every_hook_of_a_reward() -> None:
    def loose(images: Any, prompts: Any) -> list[float]:
        torch.set_grad_enabled(False)
        return [0.0] * len(images)

    hooks = ("check", "announce", "run_in", "close", "modules")
    for hook in hooks:
        setattr(loose, hook, lambda *given, **columns: [torch.set_grad_enabled(False)][:0])
    rewards = load_rewards([loose])
    with pytest.warns(UserWarning, match="reward 'loose' changed the grad mode"):
        for call in (
            rewards.load,
            lambda: rewards.check(ROWS),
            lambda: rewards.announce(IMAGES, ROWS, GROUPS),
            lambda: rewards.run_in(Path("x")),
            rewards.offload,
            lambda: rewards.score(IMAGES, ROWS, GROUPS),
            lambda: rewards(IMAGES, ROWS),
            rewards.close,
        ):
            call()
            assert torch.is_grad_enabled()


def vandal(images: Any, prompts: Any, tags: Any, box: Any) -> list[float]:
    """Ruins all that it is given."""
    for image in images:
        ImageDraw.Draw(image).rectangle((0, 0, 15, 15), fill="black")
        image.thumbnail((8, 8))
    for one, other in zip(tags, box, strict=True):
        one.append("b")
        other["x"].clear()
    for column in (images, prompts, tags, box):
        column.clear()
    return [0.0] * 4


def test_no_reward_sees_what_another_has_ruined() -> None:
    seen: list[Any] = []

    def watcher(images: Any, prompts: Any, tags: Any, box: Any) -> list[float]:
        seen.append(([image.size for image in images], list(prompts), tags, box))
        return [image.getpixel((0, 0))[0] / 255 for image in images]

    vandal.__name__, watcher.__name__ = "a", "b"
    for order in ([vandal, watcher], [watcher, vandal]):
        found = load_rewards(order).score(IMAGES, ROWS, GROUPS).by_name["b"]
        assert found.tolist() == [1, 0, 1, 0]
        assert load_rewards(order)(IMAGES, ROWS).by_name["b"].tolist() == [1, 0, 1, 0]
    good = ([(16, 16)] * 4, ["p0", "p1", "p2", "p3"], [["a"]] * 4, [{"x": [1]}] * 4)
    assert seen == [good] * 4
    assert ROWS[0].metadata == {"tags": ["a"], "box": {"x": [1]}}


def test_a_further_try_has_pictures_of_its_own() -> None:
    seen: list[Any] = []

    def second(images: Any, prompts: Any, tags: Any) -> list[float]:
        seen.append(([image.size for image in images], [list(one) for one in tags]))
        for image, tag in zip(images, tags, strict=True):
            image.thumbnail((8, 8))
            tag.clear()
        images.clear()
        if len(seen) == 1:
            raise ValueError("again")
        return [1.0] * 4

    how: Any = {second: {"retries": 1, "pause": 0}}
    assert load_rewards(how).score(IMAGES, ROWS, GROUPS).by_name["second"].tolist() == [1.0] * 4
    assert seen == [([(16, 16)] * 4, [["a"]] * 4)] * 2


def test_tensors_and_checked_rows_are_copies_too() -> None:
    video = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)

    class Paints(Reward):
        def __call__(self, images: Any, prompts: Any, **columns: Any) -> list[float]:
            images[0].fill_(9)
            return [1.0]

        def check(self, prompts: Any) -> None:
            for prompt in prompts:
                prompt.metadata.clear()

    rewards = load_rewards([Paints()])
    rewards.check(ROWS)
    rewards([video], [Prompt("a", {})])  # pyright: ignore[reportArgumentType]
    assert not video.any() and all(row.metadata for row in ROWS)


def test_a_copy_shares_nothing_that_can_be_changed() -> None:
    value = {"a": [1, (np.zeros(2), torch.zeros(2))], "b": {3}, "c": Prompt("x", {"k": [1]})}
    made: Any = own(value)
    made["a"][1][0][0] = made["a"][1][1][0] = 7
    made["b"].add(4)
    made["a"].append(made["c"].metadata["k"].append(2))
    assert not value["a"][1][0].any() and not value["a"][1][1].any()
    assert len(value["a"]) == 2 and value["b"] == {3} and value["c"].metadata == {"k": [1]}
    lock = threading.Lock()
    assert own([lock]) == [lock]  # there is no copy of it


def test_a_reward_that_empties_its_lists_is_told_how_many_pictures_there_were() -> None:
    def empties(images: Any, prompts: Any) -> list[float]:
        images.clear()
        prompts.clear()
        return [1.0] * len(images)

    with pytest.raises(RewardFailure, match="returned 0 numbers for 4 images"):
        load_rewards([empties])(IMAGES, ROWS)


@pytest.mark.parametrize("timeout", [None, 5.0])
@pytest.mark.parametrize(
    "error", [Mute(), asyncio.CancelledError(), BaseException("base"), SystemExit(3)]
)
def test_whatever_a_reward_raises_goes_through_on_error(
    error: BaseException, timeout: float | None
) -> None:
    def bad(images: Any, prompts: Any) -> list[float]:
        raise error

    skips: Any = {bad: {"on_error": "skip_group", "timeout": timeout}}
    lost = load_rewards(skips).score(IMAGES, ROWS, GROUPS).lost
    assert sorted(lost) == [0, 1] and type(error).__name__ in lost[0] and "'bad'" in lost[0]
    with pytest.raises(RewardFailure, match="'bad'"):
        load_rewards({bad: {"timeout": timeout}}).score(IMAGES, ROWS, GROUPS)  # pyright: ignore


def test_a_reward_that_disturbs_the_process_is_not_asked_beside_the_sampling() -> None:
    threads: list[bool] = []

    def wide(images: Any, prompts: Any) -> list[float]:
        threads.append(threading.current_thread() is threading.main_thread())
        torch.set_default_dtype(torch.float64)
        return [0.0] * len(images)

    rewards = load_rewards([wide])
    for _ in range(2):
        with Scoring(rewards, ROWS[:2], size=2, overlap=True) as scoring:
            scoring.add(IMAGES)
            scoring.finish()
    assert threads == [False, True] and torch.get_default_dtype() == torch.float32


# ------------------------------------------------------------------ the update


def brightness(images: Any, prompts: Any) -> list[float]:
    return [float(np.asarray(image.convert("L")).mean()) / 255 for image in images]


HOSTILE = [name for name in CHANGES if "handlers" not in name]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The metrics of a run whose reward changes nothing."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    with pytest.MonkeyPatch.context() as patch:
        light(patch)
        pipe = sd3_small()
        states = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
        trainer(folder, brightness, model=pipe).train()
        after = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    assert states == after  # all that is drawn for a run comes from generators of its own
    return without_times(folder)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_hostile_reward_trains_the_same_numbers(
    overlap: bool, calm: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    light(monkeypatch)

    def hostile(images: Any, prompts: Any) -> list[float]:
        found = brightness(images, prompts)
        for name in HOSTILE:
            CHANGES[name]()
        reseed()
        for image in images:
            image.thumbnail((2, 2))
        return found

    hostile.__name__ = "brightness"
    with pytest.warns(UserWarning, match="reward 'brightness' changed the grad mode"):
        run = trainer(
            tmp_path / "run", hostile, rollout={"overlap_rewards": overlap}, callbacks=[Loose]
        )
        run.train()
    found = [_without(line, "seconds_reward_hidden") for line in without_times(tmp_path / "run")]
    assert found == calm
    assert all(row["grad_norm"] > 0 for row in rows(tmp_path / "run"))


def _without(line: str, column: str) -> str:
    row = json.loads(line)
    row.pop(column, None)
    return json.dumps(row)


def test_a_script_that_has_switched_gradients_off_trains_all_the_same(
    calm: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    light(monkeypatch)
    run = trainer(tmp_path / "run", brightness)
    with torch.inference_mode():
        run.train()
    assert without_times(tmp_path / "run") == calm


def test_a_gradient_of_exactly_0_stops_the_run_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    light(monkeypatch)

    class Detached(Spy):
        name = "detached"
        says: bool = False

        def loss(self, points: Any) -> Any:
            loss, metrics = super().loss(points)
            if not self.says:
                metrics.pop("clipped", None)
            else:
                metrics["clipped"] = torch.ones(())
            return loss * 0, metrics

    run = trainer(tmp_path / "a", brightness, algorithm=Detached(timesteps=TIMESTEPS))  # pyright: ignore
    before = [p.detach().clone() for p in run.updater.parameters]
    with pytest.raises(UserError, match=r"iteration 1: .*exactly 0 over all \d+ trained tensors"):
        run.train()
    assert all(map(torch.equal, before, run.updater.parameters))
    # a trust region that has stopped samples is a reason
    said = Detached(timesteps=TIMESTEPS, says=True)  # pyright: ignore
    trainer(tmp_path / "b", brightness, algorithm=said).train()
    assert [row["grad_norm"] for row in rows(tmp_path / "b")] == [0.0, 0.0]
