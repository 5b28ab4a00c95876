"""Weights that are put in place for a block are back wherever a stop cuts it off."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import dgpo.models
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.models.weights.restoring import restore_now, restoring
from dgpo.recipe import Recipe
from families.tiny import sd3_small
from tiny_runs import settings

TRACED = (str(Path(dgpo.models.__file__).parent), contextlib.__file__)
BLOCKS: dict[str, Callable[[Policy], AbstractContextManager[None]]] = {
    "slow": lambda policy: policy.rolling("slow"),
    "policy": lambda policy: policy.rolling("policy"),
    "reference": Policy.reference,
    "blended": lambda policy: policy.passes.blended(),
}


class Stopped(BaseException):
    pass


class StopAt:
    """A tracer that stops what it traces at one of its lines, or as one of its calls returns."""

    def __init__(self, number: int | None = None) -> None:
        self.number = number
        self.seen: list[tuple[str, int, str]] = []

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        if event in ("line", "return"):
            if len(self.seen) == self.number:
                raise Stopped
            self.seen.append((frame.f_code.co_filename, frame.f_lineno, event))
        return self

    def run(self, block: AbstractContextManager[None]) -> bool:
        """Enter and leave a block; whether it was stopped, and all is put back while the stop is
        still on its way: its traceback holds the frames that it has cut off."""
        sys.settrace(self)
        try:
            with block:
                pass
        except Stopped:
            sys.settrace(None)
            restore_now()
            return True
        finally:
            sys.settrace(None)
        return False


NARROW: dict[str, Callable[[Policy], AbstractContextManager[None]]] = {
    "slow": lambda policy: policy.rolling("slow"),
    "policy": lambda policy: policy._trained(),
    "reference": Policy.reference,
}


def policy(full: bool, narrow: bool = False) -> Policy:
    model = PipelineModel(sd3_small(), call={"height": 16, "width": 16})
    if narrow:
        model.pipe.to(torch.bfloat16)
    made = Policy(model, None if full else Recipe.from_dict(settings()).lora)
    if narrow:  # as where the denoiser is compiled
        made.passes._switch.gate = torch.ones((), dtype=torch.bool)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.125)
    return made


def state(policy: Policy) -> list[Any]:
    """Where every weight lies, whether it has gradients, and how the LoRA takes part."""
    (denoiser,) = policy.model.denoisers.values()
    weights = [(weight.data_ptr(), weight.requires_grad) for weight in denoiser.parameters()]
    switch, layers = policy.passes._switch, policy.passes.layers
    gate = None if switch.gate is None else bool(switch.gate)
    return [*weights, switch.off, gate, *(layer.pair for layer in layers)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_whatever_line_a_stop_comes_at(block: str, full: bool) -> None:
    stop_everywhere(policy(full), BLOCKS[block])


@pytest.mark.parametrize("block", NARROW)
def test_whatever_line_a_stop_comes_at_over_half_precision(block: str) -> None:
    stop_everywhere(policy(full=False, narrow=True), NARROW[block])


def stop_everywhere(
    trained: Policy, block: Callable[[Policy], AbstractContextManager[None]]
) -> None:
    through = StopAt()
    before = state(trained)
    assert not through.run(block(trained))
    # of what is done over and over, the first time and the last
    first = {event: number for number, event in reversed(list(enumerate(through.seen)))}
    last = {event: number for number, event in enumerate(through.seen)}
    for number in sorted({*first.values(), *last.values()}):
        assert StopAt(number).run(block(trained))
        assert state(trained) == before, through.seen[number]
    assert len(last) > 20


def test_blocks_end_in_any_order_and_once() -> None:
    """A block that was cut off may be closed long after a stop has been heard."""
    done: list[str] = []
    outer, inner = (restoring(lambda name=name: done.append(name)) for name in ("outer", "inner"))
    outer.__enter__()
    inner.__enter__()
    restore_now()
    assert done == ["inner", "outer"]
    with restoring(lambda: done.append("next")):
        inner.__exit__(None, None, None)
        outer.__exit__(None, None, None)
        assert done == ["inner", "outer"]
    assert done == ["inner", "outer", "next"]
