"""Two probes inside a pipeline's denoising loop: one listens, one stops it.

A :class:`Recording` wraps the scheduler of a whole rollout. A :class:`StandIn` replaces the
scheduler for one evaluation of the denoiser: it dictates the timestep, and leaves the loop with
what the pipeline would have handed to ``scheduler.step``.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dgpo.core.process import Level
from dgpo.errors import UserError
from dgpo.models.samplers.schedulers import level_of_last_step

_MISSING = object()
_PLAIN = (int, float, str, torch.dtype, torch.device, type(None))
SECOND_SCHEDULER = (
    "model: cannot train this pipeline: it steps a second scheduler (of a sound, for example) "
    "beside its own, and what is trained is a single sample"
)


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Inside the block ``owner`` has other instance attributes."""
    own = vars(owner)  # past __setattr__: a pipeline notes every change of a part in its config
    before = {name: own.get(name, _MISSING) for name in attributes}
    own.update(attributes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _MISSING:
                del own[name]
            else:
                own[name] = value


@contextmanager
def on_device(pipe: Any, device: torch.device) -> Iterator[None]:
    """Inside the block a pipeline knows the device that it computes on.

    Its own answer asks every module of every part, at every call. It is a property, which only
    another class can replace.
    """
    own = type(pipe)
    object.__setattr__(pipe, "__class__", _on_device_class(own))
    try:
        with replaced(pipe, _dgpo_device=device):
            yield
    finally:
        object.__setattr__(pipe, "__class__", own)


@functools.cache
def _on_device_class(own: type) -> type:
    answer = property(lambda pipe: pipe._dgpo_device)
    return type(own.__name__, (own,), {"_execution_device": answer, "__module__": own.__module__})


@dataclass(frozen=True)
class Step:
    """A ``Step`` is one scheduler step of a rollout.

    Args:
        index: its place among the steps, from 0.
        level: the noise level before the step.
        sample: [B, ...], as the denoiser saw it.
        output: [B, ...], what the pipeline made of the denoiser's answer.
        previous: [B, ...], the sample that the scheduler returned.
    """

    index: int
    level: Level
    sample: Tensor
    output: Tensor
    previous: Tensor


@dataclass
class Recording:
    """A ``Recording`` listens to ``scheduler.step``.

    It keeps all levels, the last sample, and the tensors of the steps whose places are in ``keep``
    (True for all steps).
    """

    keep: bool | Container[int] = False
    levels: list[Level] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    last: Tensor | None = None
    taken: int = 0

    def listen(self, scheduler: Any) -> None:
        """Wrap the ``step`` of a scheduler that nobody else uses; it is never unwrapped.

        The step raises UserError if the pipeline steps a copy of the scheduler, or a sample of
        another shape than before.
        """
        original = scheduler.step
        scale = getattr(scheduler, "scale_model_input", None)

        @functools.wraps(getattr(original, "__func__", original))
        def step(
            own: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            if own is not scheduler:
                raise UserError(SECOND_SCHEDULER)
            if self.last is not None and sample.shape != self.last.shape:
                raise UserError(
                    "model: cannot train this pipeline: its scheduler is given samples of shape "
                    f"{tuple(self.last.shape)} and of {tuple(sample.shape)}, and what is trained "
                    "is a single sample"
                )
            index, seen = self.taken, sample
            kept = self.keep if isinstance(self.keep, bool) else index in self.keep
            self.taken += 1
            if kept:
                seen = sample if scale is None else scale(sample, timestep)
            result = original(model_output, timestep, sample, *args, **kwargs)
            previous = result[0] if isinstance(result, tuple) else result.prev_sample
            level = level_of_last_step(scheduler, timestep)
            # a solver of second order visits a level twice, which the schedule names once
            if not self.levels or not _same(self.levels[-1], level):
                self.levels.append(level)
            if kept:
                tensors = seen.detach().clone(), model_output.detach().clone(), previous
                self.steps.append(Step(index, level, *tensors))
            self.last = previous
            return result

        # a method: in a pipeline's deep copy of the scheduler it is bound to the copy, and tells
        scheduler.step = types.MethodType(step, scheduler)


def _same(a: Level, b: Level) -> bool:
    return a.sigma == b.sigma and bool(a.timestep == b.timestep)


class Evaluated(Exception):
    """``Evaluated`` leaves a pipeline's loop once the denoiser has answered."""


class StandIn:
    """A ``StandIn`` is a scheduler that stops a pipeline's loop at its first step.

    It is mixed in before the scheduler's own class, so that a pipeline which asks for the class of
    its scheduler gets the same answer.
    """

    point: Tensor  # [1], the timestep to evaluate at
    answer: Tensor | None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        timesteps: Any = None,
        mu: Any = None,
        **_: Any,
    ) -> None:
        """Set one level over and over: the level of the evaluation."""
        # however many first steps a pipeline leaves out, the next one is at this level
        count = num_inference_steps or len(sigmas if sigmas is not None else timesteps)
        repeated = self.point.repeat(count * getattr(self, "order", 1))
        self.timesteps = repeated if device is None else repeated.to(device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample as it is: a recorded one is scaled already."""
        return sample

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Do nothing: all steps are at one level."""

    def step(self, model_output: Tensor, *args: Any, **kwargs: Any) -> None:
        """Keep what the pipeline hands over, and leave its loop."""
        self.answer = model_output
        raise Evaluated

    def __deepcopy__(self, memo: Any) -> Any:
        raise UserError(SECOND_SCHEDULER)  # a pipeline copies it to step a second sample


def mixed_in(mixin: type, scheduler: Any) -> Any:
    """Return a copy of a scheduler whose class has ``mixin`` before the scheduler's own class."""
    made = copy.copy(scheduler)
    made.__class__ = _mixed_class(mixin, type(scheduler))
    return made


@functools.cache
def _mixed_class(mixin: type, scheduler_class: type) -> type:
    return type(f"{mixin.__name__}Of{scheduler_class.__name__}", (mixin, scheduler_class), {})


def stand_in_for(scheduler: Any) -> Any:
    """Return a scheduler that looks like ``scheduler`` and stops the loop at its first step."""
    made = mixed_in(StandIn, scheduler)
    made.num_inference_steps = 1
    made.answer = None
    made.sigmas = torch.zeros(2)
    return made


def given_latents(
    prepare: Callable[..., Any], xt: Tensor, known: dict[Any, Tensor]
) -> Callable[..., Any]:
    """Return a ``prepare_latents`` that returns ``xt`` in place of the pipeline's own latents.

    Args:
        prepare: the pipeline's own.
        xt: [B, ...], the latents to return.
        known: empty tensors like latents that were made before, by the arguments that led to them.
            Latents that come alone are not drawn again.
    """

    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        named = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
        key = tuple((n, v) for n, v in named.items() if not _is_generators(v))
        plain = all(isinstance(v, _PLAIN) for _, v in key)
        made = known[key] if plain and key in known else prepare(*args, **kwargs)
        latents = made[0] if isinstance(made, tuple) else made
        if plain and latents is made:
            # one number that looks like all of them
            known[key] = latents.new_empty(()).expand(latents.shape)
        if latents.shape != xt.shape:
            raise ValueError(
                f"xt has shape {tuple(xt.shape)}, but the loop of the pipeline works on "
                f"{tuple(latents.shape)}: are height and width those of the rollout, and does its "
                "scheduler step all of the latents?"
            )
        given = xt.to(device=latents.device, dtype=latents.dtype)
        return (given, *made[1:]) if isinstance(made, tuple) else given

    return prepare_latents


def _is_generators(value: Any) -> bool:
    return isinstance(value[0] if isinstance(value, list) and value else value, torch.Generator)
