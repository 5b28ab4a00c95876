"""Rewards that do anything at once: the reward beside them and the process are as without them."""

from __future__ import annotations

import asyncio
import copy
import math
import os
import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dgpo.core.groups import Groups
from dgpo.prompts import Prompt
from dgpo.rewards import Scored, load_rewards
from dgpo.rewards.mixing import mix
from fuzz.parts import PROFILE, value_or_error

COUNT, GROUPS = 4, [0, 0, 1, 1]
IMAGES = [Image.new("RGB", (4, 4), (60 * row, 0, 0)) for row in range(COUNT)]
ROWS = [Prompt(f"p{row}", {"tags": ["a", {"x": [row]}]}) for row in range(COUNT)]


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Strange:
    def __repr__(self) -> str:
        raise RuntimeError("no picture")

    def __len__(self) -> int:
        return COUNT


def _raise(error: BaseException) -> Callable[..., Any]:
    def act(images: Any, prompts: Any, tags: Any) -> None:
        raise error

    return act


def _draw(images: Any, prompts: Any, tags: Any) -> None:
    for image in images:
        image.paste((255, 255, 255), (0, 0, *image.size))
        image.thumbnail((1, 1))


def _empty(images: Any, prompts: Any, tags: Any) -> None:
    for column in (images, prompts, tags):
        column.clear()


def _nested(images: Any, prompts: Any, tags: Any) -> None:
    for tag in tags:
        tag[1]["x"].append(7)
        tag.pop()


def _enter(block: Callable[[], Any]) -> Callable[..., Any]:
    return lambda *given: block().__enter__()


def _do(change: Callable[[], Any]) -> Callable[..., Any]:
    return lambda *given: change()


ACTS = st.sampled_from(
    [
        _draw, _empty, _nested,
        *map(_raise, [ValueError("no"), Mute(), asyncio.CancelledError(), BaseException("b"),
                      SystemExit(2), GeneratorExit(), MemoryError(), StopIteration()]),
        _do(lambda: torch.set_grad_enabled(False)),
        _do(lambda: torch.set_default_dtype(torch.float64)),
        _do(lambda: torch.set_default_device("meta")),
        _do(lambda: torch.use_deterministic_algorithms(True)),
        _do(lambda: torch.set_float32_matmul_precision("high")),
        _do(lambda: setattr(torch.backends.cudnn, "benchmark", True)),
        _do(lambda: np.seterr(all="raise")),
        _do(lambda: os.chdir("/")),
        _do(lambda: (random.seed(0), np.random.seed(0), torch.manual_seed(0))),
        _enter(torch.inference_mode), _enter(torch.no_grad),
        _enter(lambda: torch.autocast("cpu")), _enter(lambda: torch.device("meta")),
    ]
)  # fmt: skip
ANSWERS = st.lists(
    st.floats(width=32)
    | st.sampled_from([None, "1", True, 10**400, 1e39, math.nan, np.float64(2), Strange()]),
    max_size=6,
) | st.sampled_from([None, 0.5, [0.0] * 4, [0.0, 1.0, 1e20, -1e20], Strange(), {}, np.ones(4)])


def state() -> list[Any]:
    return [
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        torch.ones(1).device, torch.is_autocast_enabled("cpu"), torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        np.geterr(), os.getcwd(),
    ]  # fmt: skip


def red(images: Any, prompts: Any, tags: Any) -> list[float]:
    assert [image.size for image in images] == [(4, 4)] * len(prompts)
    assert tags == [["a", {"x": [int(prompt[1:])]}] for prompt in prompts]
    return [float(image.getpixel((0, 0))[0]) for image in images]


@PROFILE
@given(
    acts=st.lists(ACTS, max_size=4),
    answer=ANSWERS,
    skips=st.booleans(),
    retries=st.integers(0, 1),
    last=st.booleans(),
)
def test_a_hostile_reward_reaches_nothing(
    acts: list[Any], answer: Any, skips: bool, retries: int, last: bool
) -> None:
    def hostile(images: Any, prompts: Any, tags: Any) -> Any:
        for act in acts:
            act(images, prompts, tags)
        return copy.copy(answer)

    how = {"on_error": "skip_group" if skips else "stop", "retries": retries, "pause": 0}
    both: list[Any] = [(hostile, how), (red, 1.0)]
    rewards = load_rewards(dict(both if last else both[::-1]))
    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scored = value_or_error(lambda: rewards.score(IMAGES, ROWS, GROUPS))
    assert state() == before
    assert [image.size for image in IMAGES] == [(4, 4)] * COUNT
    assert [row.metadata for row in ROWS] == [{"tags": ["a", {"x": [row]}]} for row in range(4)]
    if scored is None:
        assert not skips
        return
    _check(scored)


def _check(scored: Scored) -> None:
    values = scored.by_name["red"]
    kept = [row for row, group in enumerate(GROUPS) if group not in scored.lost]
    assert values[kept].tolist() == [60.0 * row for row in kept]
    if scored.lost:
        return
    groups = Groups.contiguous(2, 2)
    for combine in ("sum", "gdpo"):
        mixed = value_or_error(partial(mix, scored.by_name, scored.weights, groups, combine))
        if mixed is not None:
            normal = groups.normalize(mixed.merit)
            assert bool(normal.isfinite().all()) and float(normal.abs().max()) <= 1.0


@PROFILE
@given(
    numbers=st.lists(st.integers(-1000, 1000), min_size=6, max_size=6),
    power=st.integers(-90, 90),
    scale=st.sampled_from(["group", "batch"]),
)
def test_a_unit_that_is_a_power_of_two_changes_no_bit(
    numbers: list[int], power: int, scale: Any
) -> None:
    groups, x = Groups.contiguous(2, 3), torch.tensor(numbers, dtype=torch.float32)
    assert torch.equal(groups.normalize(2.0**power * x, scale), groups.normalize(x, scale))
