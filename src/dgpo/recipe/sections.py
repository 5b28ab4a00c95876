"""The sections of a recipe, with their defaults and ranges."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from dgpo.secrets import masked
from dgpo.settings import Settings

MOST_STEPS = 10_000
"""Sampling steps; schedules are held in memory."""
MOST_PIXELS = 100_000
"""Of a side of a picture, or frames of a video."""


def _sde(value: Any) -> Any:
    """The settings of a stochastic sampler; imported only for a recipe that has one, since it
    brings torch, for which ``dgpo --help`` shall not wait."""
    if value is None:
        return None
    from dgpo.core.sde import AnySde

    try:
        return TypeAdapter(AnySde).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][1:])
        raise ValueError(
            f"rollout.sde = {masked(value)!r:.80}: {key}{': ' if key else ''}{first['msg']}; for "
            "example {kind: flow, noise_level: 0.7}"
        ) from error


def _auto_or_names(value: Any) -> Any:
    named = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
    if value != "auto" and not (named and value):
        raise ValueError(
            f"lora.targets = {masked(value)!r:.80}: use auto, or a list of how layers' names end, "
            "such as [to_q, to_v]"
        )
    return value


class PromptSettings(Settings):
    train: str | None = None
    """A .txt or .jsonl file or a registered set, such as pocket-geneval/train."""
    eval: str | None = None
    """Held-out prompts, likewise."""


class DataSettings(Settings):
    preferences: str | None = None
    """Folder of groups that were ranked before (docs/offline.md): they are trained on, nothing is
    sampled, and prompts.train and the rewards are not asked in training; null: train on the
    model's own pictures."""
    pick: Literal["all", "random", "extremes"] = "all"
    """Of a group with more than group_size pictures: refuse it (all), draw group_size of them anew
    each time (random), or take the best, the worst, the second best, ... (extremes)."""


class RolloutSettings(Settings):
    scheduler: str | None = None
    """Sampler by name (euler, heun, dpmsolver++, unipc, ddim, pndm, deis); null: the pipeline's."""
    steps: int = Field(default=10, ge=1, le=MOST_STEPS)
    """Sampling steps."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance of the rollouts; 1 is none."""
    batch: int | None = Field(default=None, ge=1)
    """Images per call of the pipeline in each process; null: all of an iteration."""
    overlap_rewards: bool | None = None
    """Ask the rewards about one batch while the next is sampled; null: where batch makes several.
    It changes no result."""
    ahead: int = Field(default=0, ge=0)
    """Iterations whose pictures are sampled before those of the one that is trained next have their
    rewards, by weights that are so many updates old: so that people who rank never wait."""
    sde: Annotated[Any, BeforeValidator(_sde)] = None
    """Add noise at every step but the last, as the samplers of the policy gradients do, e.g. {kind:
    flow, noise_level: 0.7}; for a comparison, since no loss on noised samples needs it. null:
    rollout.scheduler makes them."""
    engine: str | None = None
    """Address of a server that makes the rollouts (docs/scaling.md); null: the run itself."""
    switch_to_old_after: int | None = Field(default=None, ge=0)
    """Iteration from which the old policy (the fast EMA) makes the rollouts; null: never."""
    call: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the pipeline's call, such as height and width."""

    @field_validator("call")
    @classmethod
    def _sizes_are_numbers(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in ("height", "width", "num_frames"):
            size = value.get(key)
            if size is not None and (type(size) is not int or not 1 <= size <= MOST_PIXELS):
                raise ValueError(
                    f"rollout.call.{key} = {masked(size)!r:.80}: use a whole number from 1 to "
                    f"{MOST_PIXELS}, or leave it out for the pipeline's own"
                )
        return value

    @field_validator("engine")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^@\s]+", value):
            raise ValueError(
                "rollout.engine: should be an address such as http://127.0.0.1:8770, without a "
                "password (DGPO_ROLLOUT_TOKEN holds the token)"
            )
        return value


class TrainSettings(Settings):
    iterations: int = Field(default=100, ge=1)
    max_minutes: float | None = Field(default=None, gt=0)
    """Training time after which the run ends, if that is sooner; evaluation does not count."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Samples per forward and backward pass of each process; null: all of an iteration. It changes
    no result."""
    lr: float = Field(default=3e-4, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    weight_decay: float = Field(default=1e-4, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    warmup: int = Field(default=0, ge=0)
    """Optimiser steps of linear warm-up."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    optimizer_step: Literal["iteration", "timestep"] = "iteration"
    """One step for all trained noise levels of an iteration together, or one for each."""
    inner_epochs: int = Field(default=1, ge=1, le=1000)
    """Times that the pictures of an iteration are trained on, each time at noise levels and with a
    noise of their own: fewer rollouts, of a policy that is some steps old. Not for policy
    gradients, whose algorithm.updates divides them instead."""
    sharding: Literal["none", "fsdp2"] = "none"
    """Of the denoiser's weights over several processes; none: each has them all."""
    sum_gradients: Literal["step", "micro_batch"] = "step"
    """With sharded weights that are trained: once for an optimiser step, for which each process
    holds the gradients of all weights meanwhile, or after every micro-batch, which moves more and
    needs less memory. Without sharding it is always once."""


class LoraSettings(Settings):
    rank: int = Field(default=64, ge=1, le=16_384)
    alpha: float = Field(default=128, gt=0)
    targets: Annotated[Literal["auto"] | list[str], BeforeValidator(_auto_or_names)] = "auto"
    """How the names of the adapted layers end. ``auto``: the eight joint-attention projections of
    Stable Diffusion 3 where the denoiser has them all, else its attention's projections."""
    init: Literal["gaussian", "default"] = "gaussian"


class MemorySettings(Settings):
    gradient_checkpointing: bool = False
    """Compute the denoiser's activations again at backward: less memory, more time."""
    vae_slicing: bool = False
    """Decode one sample of a batch after the other."""
    vae_tiling: bool = False
    """Decode in overlapping tiles, for large pictures; the seams differ a little."""
    vae_precision: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the autoencoder's weights; null: as ``precision``. Wan's is meant for float32."""
    prompt_cache: str | None = None
    """Folder of prompt embeddings, which other runs may share; null: none, or, where text encoders
    are freed, one in the run's folder."""
    free_text_encoders: bool = False
    """Encode all prompts first, then let go of the text encoders."""
    offload_rewards: bool = False
    """Move reward models off the device while nothing is scored."""
    snapshot_device: Literal["cpu"] | None = None
    """Where the averages of the trained weights live; null: beside them."""
    quantization: Literal["bitsandbytes_4bit", "bitsandbytes_8bit", "torchao_int8"] | None = None
    """Of the frozen denoiser, under a LoRA; null: none. The LoRA stays in float32."""


class EmaSettings(Settings):
    decay: float = Field(default=0.9, ge=0, lt=1)
    """Of the slow average of the weights, which is evaluated and saved."""
    every: int = Field(default=8, ge=1)
    """Optimiser steps between its updates."""
    warmup: bool = False
    """Hold the decay of its nth update to (1 + n) / (10 + n), so that a young average does not
    remember the base model."""

    def decay_of(self, update: int) -> float:
        """The decay of an update; they count from 1."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay


class EvalSettings(Settings):
    every: int = Field(default=20, ge=0)
    """Iterations between evaluations; 0: only at the end."""
    at: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Further iterations after which is evaluated, such as the first few."""
    metrics: list[str] = Field(default_factory=list)
    """Reward names; none: the rewards that are trained."""
    scheduler: str | None = None
    """Sampler by name; null: ``rollout.scheduler``."""
    steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """null: as in the rollouts."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """null: as in the rollouts."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many of the prompts, from the first; null: all."""
    batch: int = Field(default=256, ge=1)
    at_start: bool = True

    def due(self, iteration: int) -> bool:
        """Whether is evaluated after an iteration; they count from 1."""
        return iteration in self.at or (bool(self.every) and iteration % self.every == 0)


class CheckpointSettings(Settings):
    every: int = Field(default=50, ge=0)
    """Iterations between checkpoints; 0: only at the end."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints that are kept, from the last; with 2, a damaged one leaves another."""
    keep_best: int = Field(default=1, ge=0)
    """Checkpoints that are kept beside them for their held-out score; an evaluation that is better
    than all before it makes one."""


class GuardSettings(Settings):
    nonfinite: int = Field(default=3, ge=1)
    """Optimiser steps in a row whose loss or gradients are not finite, each left out, after which
    the run stops; the batch is saved in the run folder."""
    collapse: int = Field(default=10, ge=0)
    """Iterations in a row in which no group's rewards differ: a warning; 0: never."""
    falling: int = Field(default=3, ge=0)
    """Evaluations in a row in which a measure that is not trained (of eval.metrics) fell, and lies
    below its first value: a warning; 0: never."""
    gradient_spike: float = Field(default=10.0, ge=0)
    """A gradient norm so many times the median of the last 20: a warning; 0: never."""
    clipped: float = Field(default=0.9, ge=0, le=1)
    """Share of samples whose gradient is clipped, 10 iterations in a row: a warning; 0: never."""
    hang_minutes: float = Field(default=30.0, ge=0)
    """Time for which a process may keep the others waiting, after which the run ends and names it;
    0: never."""
    stop: bool = False
    """End the run early, and save the best checkpoint's weights, when the rewards have collapsed or
    a measure falls."""


class SampleSettings(Settings):
    count: int = Field(default=16, ge=0)
    """Pictures in the grids of fixed prompts and seeds; 0: no grids."""
    every: int | None = Field(default=None, ge=0)
    """Iterations between grids; null: as eval.every."""
    video: Literal["mp4", "gif"] = "mp4"
    """The format in which videos are written beside the grids; mp4 needs dgpo[media]."""
    fps: int = Field(default=16, ge=1)
    """Frames a second of these files."""


class RunSettings(Settings):
    dir: str = Field(default="runs/run", min_length=1)
    """The run's folder; a recipe file's default is runs/<its name>."""
