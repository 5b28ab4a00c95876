"""The sections of a recipe: settings with their defaults, ranges and rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, field_validator

from dgpo.registry import known, unknown
from dgpo.secrets import masked, secrets_in
from dgpo.settings import Settings

MOST_STEPS = 10_000
"""The largest number of sampling steps: schedules are held in memory."""
MOST_PIXELS = 100_000
"""The longest side of a picture in pixels, and the most frames of a video."""

ROWS_AT_ONCE = 16
"""The samples of a training pass on a GPU, as in the published runs of DGPO (one group): enough to
keep it busy. A larger pass needs more memory, and one over a part of a group needs a second pass of
the policy, to weigh the group."""


def is_multiple(iteration: int, every: int) -> bool:
    """Return whether what happens every so many iterations (0: never) is due after this one."""
    return every > 0 and iteration % every == 0


def _sde(value: Any) -> Any:
    """Read the settings of a stochastic sampler. They are imported only for a recipe that has one:
    they bring torch, and ``dgpo --help`` must not wait for it."""
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


def _addresses(value: Any) -> Any:
    """Read addresses: a list of them, or a text with commas between them."""
    given = value.split(",") if isinstance(value, str) else value
    every = isinstance(given, (list, tuple)) and all(isinstance(one, str) for one in given)
    found = [one.strip() for one in given] if every else []
    form = r"(vllm-omni\+|sglang\+)?https?://[^@\s]+"
    if value is None:
        return None
    if not found or not all(re.fullmatch(form, one) for one in found):
        raise ValueError(
            "rollout.engine: should be an address such as http://127.0.0.1:8770, or several, "
            "without a password (DGPO_ROLLOUT_TOKEN holds the token)"
        )
    if twice := [one for one in found if found.count(one) > 1]:
        raise ValueError(f"rollout.engine: {twice[0]} is there twice; give each server once")
    return found


def _auto_or_names(value: Any) -> Any:
    named = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
    if value != "auto" and not (named and value):
        raise ValueError(
            f"lora.targets = {masked(value)!r:.80}: use auto, or a list of how layers' names end, "
            "such as [to_q, to_v]"
        )
    return value


def _auto_or_count(value: Any) -> Any:
    if value not in ("auto", None) and not (type(value) is int and value >= 1):
        raise ValueError(
            f"train.micro_batch = {masked(value)!r:.80}: use auto, a whole number of 1 or more, or "
            "null for all samples of an iteration"
        )
    return value


class PromptSettings(Settings):
    train: str | None = None
    """The training prompts: a .txt or .jsonl file, or a registered set such as
    pocket-geneval/train."""
    eval: str | None = None
    """The held-out prompts, given in the same way; null: nothing is evaluated."""


class DataSettings(Settings):
    preferences: str | None = None
    """A folder of ranked groups (docs/offline.md) to train on. Nothing is sampled then, and
    training uses neither prompts.train nor the rewards. null: train on the model's own pictures."""
    pick: Literal["all", "random", "extremes"] = "all"
    """What to do with a ranked group of more than group_size pictures: refuse it (all), draw
    group_size of them anew each time (random), or take the best, the worst, the second best, and so
    on (extremes)."""


class AccelerateSettings(Settings):
    steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """The number of sampling steps of training's rollouts, fewer than rollout.steps. That one still
    says which noise levels are trained and how evaluations sample. null: rollout.steps."""
    cache: Literal["first_block", "taylorseer", "fastercache"] | None = None
    """The cache of diffusers that takes outputs of blocks (first_block) or of attention
    (taylorseer, fastercache) from earlier steps; null: none."""
    cache_options: dict[str, Any] = Field(default_factory=dict)
    """Fields of diffusers' FirstBlockCacheConfig, TaylorSeerCacheConfig or FasterCacheConfig, such
    as {threshold: 0.1}."""
    precision: Literal["merged", "int8", "fp8"] | None = None
    """Merge a LoRA into a base in half precision (merged), or merge it and multiply in 8 bits
    (int8, or fp8 on NVIDIA GPUs from Ada on); null: as in training."""
    compile: bool = False
    """Compile the denoiser's blocks for rollouts alone."""
    check_every: int = Field(default=20, ge=1)
    """The number of iterations between checks: a group is sampled exactly and inexactly, and the
    distance is written down (rollout_distance). The first iteration is always checked."""


class RolloutSettings(Settings):
    scheduler: str | None = None
    """The sampler: euler, heun, dpmsolver++, unipc, ddim, pndm or deis; null: the pipeline's."""
    steps: int = Field(default=10, ge=1, le=MOST_STEPS)
    """The number of sampling steps."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """The scale of classifier-free guidance in rollouts; 1: no guidance."""
    batch: int | None = Field(default=None, ge=1)
    """The number of pictures in one call of the pipeline, in each process; null: all pictures of an
    iteration."""
    overlap_rewards: bool | None = None
    """Score one batch while the next is sampled and, with ahead, while the policy is trained; null:
    yes where rollout.batch makes several batches, or something is sampled ahead. It changes no
    result."""
    ahead: int = Field(default=0, ge=0)
    """How many iterations to sample ahead of training, so that slow rewards never hold it up, nor
    rollouts that an engine makes. Each batch comes from weights that are as many updates old."""
    sde: Annotated[Any, BeforeValidator(_sde)] = None
    """A sampler that adds noise at every step but the last, e.g. {kind: flow, noise_level: 0.7}. It
    serves comparisons: losses on noised samples do not need it. null: rollout.scheduler samples."""
    engine: Annotated[list[str] | None, BeforeValidator(_addresses)] = None
    """The address of a server that makes the rollouts, or several (docs/scaling.md); null: the run
    makes them itself."""
    accelerate: AccelerateSettings | None = None
    """Faster, inexact rollouts for training alone (docs/performance.md), e.g. {steps: 6}; null:
    exact."""
    switch_to_old_after: int | None = Field(default=None, ge=0)
    """The iteration from which the old policy, a fast average of the weights, makes the rollouts;
    null: never."""
    call: dict[str, Any] = Field(default_factory=dict)
    """Additional keyword arguments of the pipeline's call, such as height and width."""

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


_Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(Settings):
    iterations: int = Field(default=100, ge=1)
    """The number of iterations of the run."""
    max_minutes: float | None = Field(default=None, gt=0)
    """The training time in minutes after which the run ends, unless its iterations end sooner;
    evaluation does not count. null: no limit."""
    micro_batch: Annotated[Literal["auto"] | int | None, BeforeValidator(_auto_or_count)] = "auto"
    """The number of samples in one forward and backward pass of each process; null: all samples of
    an iteration. auto: all of them on the CPU; on a GPU whole groups, as many as make 16 samples,
    and at least one. It changes no result, but a pass over a part of a group may cost another."""
    lr: float = Field(default=3e-4, gt=0)
    """The learning rate of AdamW."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.999)
    """The decay rates of AdamW's two averages."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """The weight decay of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The norm to which larger gradients are scaled down."""
    warmup: int = Field(default=0, ge=0)
    """The number of optimiser steps over which the learning rate rises linearly."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls to 0 by the end of the run; constant: not at all."""
    optimizer_step: Literal["iteration", "timestep"] = "iteration"
    """The noise levels of an optimiser step: all that an iteration trains, or a single one."""
    inner_epochs: int = Field(default=1, ge=1, le=1000)
    """How often an iteration trains on its pictures, each time at new noise levels and with new
    noise. More needs fewer rollouts, but these come from an older policy. Policy gradients divide
    their pictures by algorithm.updates instead."""
    sharding: Literal["none", "fsdp2"] = "none"
    """How several processes hold the denoiser's weights: each process all of them (none), or a
    share of them (fsdp2)."""
    sum_gradients: Literal["step", "micro_batch"] = "step"
    """When processes with sharded, trained weights sum their gradients: once in an optimiser step,
    for which each holds all gradients in between, or after every micro-batch, which moves more data
    and needs less memory."""
    sharding_size: int | None = Field(default=None, ge=2)
    """The number of processes that share one copy of sharded weights, a divisor of the number of
    processes (HSDP); null: all of them. With that of one machine's GPUs weights are gathered within
    machines, and gradients alone move between them."""
    sharding_offload: bool = False
    """Keep the pieces of sharded, trained weights, their averages and the optimiser's on the CPU,
    which then takes the optimiser's steps."""
    reshard: bool = True
    """Let each block go of its gathered weights after its pass. false: a frozen base under a LoRA
    is gathered once for the rollouts and once for the update of an iteration, and has to fit."""

    def time_is_up(self, seconds: float) -> bool:
        """Return whether a run of so many seconds of training has spent its ``max_minutes``."""
        return self.max_minutes is not None and seconds >= 60 * self.max_minutes


class LoraSettings(Settings):
    rank: int = Field(default=64, ge=1, le=16_384)
    """The rank of the LoRA's matrices; their product is scaled by alpha / rank."""
    alpha: float = Field(default=128, gt=0)
    targets: Annotated[Literal["auto"] | list[str], BeforeValidator(_auto_or_names)] = "auto"
    """How the names of the adapted layers end. ``auto``: the eight joint-attention projections of
    Stable Diffusion 3 where the denoiser has them all, else its attention's projections."""
    init: Literal["gaussian", "default"] = "gaussian"
    """How the first of each pair of matrices starts: Gaussian, or by peft's default. The second
    starts at 0."""


class MemorySettings(Settings):
    gradient_checkpointing: bool = False
    """Compute the denoiser's activations again in the backward pass, which needs less
    memory and more time."""
    vae_slicing: bool = False
    """Decode the samples of a batch one after the other."""
    vae_tiling: bool = False
    """Decode large pictures in overlapping tiles; the seams differ a little."""
    vae_precision: Literal["float32", "bfloat16", "float16"] | None = None
    """The precision of the autoencoder's weights; null: as precision. Wan's autoencoder is meant
    for float32."""
    prompt_cache: str | None = None
    """A folder of prompt embeddings, which other runs may share; null: no folder, or one inside the
    run's folder where text encoders are freed."""
    free_text_encoders: bool = False
    """Encode all prompts that the run will draw first, and then drop the text encoders."""
    offload_text_encoders: bool = False
    """Keep the text encoders on the CPU except while prompts are encoded."""
    offload_rewards: bool = False
    """Move reward models off the device while nothing is scored."""
    snapshot_device: Literal["cpu"] | None = None
    """Where the averages of the trained weights are kept; null: on the device of the weights."""
    quantization: Literal["bitsandbytes_4bit", "bitsandbytes_8bit", "torchao_int8"] | None = None
    """How to round the frozen denoiser under a LoRA, whose weights stay in float32; null: not at
    all."""


def _compile(value: Any) -> Any:
    return {True: "blocks", False: "off"}[value] if isinstance(value, bool) else value


class ComputeSettings(Settings):
    compile: Annotated[Literal["off", "blocks", "full"], BeforeValidator(_compile)] = "off"
    """What torch.compile makes larger kernels of: each block that the denoiser repeats (blocks, or
    true), the whole denoiser, which takes longer to compile (full), or nothing (off, or false)."""
    attention: str | None = None
    """The name that diffusers gives the kernel of the denoiser's attention, such as _native_cudnn
    or flash; null: diffusers and torch choose."""
    tf32: bool | None = None
    """Let products of float32 numbers round their inputs to TF32 on a GPU (true), or not (false);
    null leaves it to torch."""
    cudnn_benchmark: bool | None = None
    """Let cuDNN try its algorithms for each new shape and keep the fastest (true), or not (false);
    null leaves it to torch."""


def _warmup(value: Any) -> Any:
    return {True: "updates", False: None}[value] if isinstance(value, bool) else value


class EmaSettings(Settings):
    decay: float = Field(default=0.9, ge=0, lt=1)
    """The decay of the slow average of the weights, which is evaluated and saved."""
    every: int = Field(default=8, ge=1)
    """The number of optimiser steps between updates of the slow average."""
    moves: int = Field(default=1, ge=1)
    """How often an update moves the average. The published runs of DGPO move it once for each
    micro-batch: 2 (GenEval, OCR) and 4 (PickScore)."""
    warmup: Annotated[Literal["updates", "steps"] | None, BeforeValidator(_warmup)] = "updates"
    """Limit the decay to (1 + n) / (10 + n), so that a young average does not remember the base
    model. n counts the updates from 1 (updates, or true) or the optimiser steps from 0 (steps, as
    in the published runs of DGPO, which forgets more slowly); null or false: no limit."""

    def decay_of(self, step: int) -> float:
        """Return what an update keeps of the average after an optimiser step, counted from 1."""
        n = step - 1 if self.warmup == "steps" else step // self.every
        decay = self.decay if self.warmup is None else min(self.decay, (1 + n) / (10 + n))
        return decay**self.moves

    def base_share(self, steps: int) -> float:
        """Return how much of the average is still the base model after so many optimiser steps."""
        share = 1.0
        for step in range(self.every, steps + 1, self.every):
            if share < 1e-6:  # a long run has forgotten it
                break
            share *= self.decay_of(step)
        return share


class EvalSettings(Settings):
    every: int = Field(default=20, ge=0)
    """The number of iterations between evaluations; 0: evaluate at the end only."""
    at: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Additional iterations to evaluate after, such as the first few."""
    metrics: list[str] = Field(default_factory=list)
    """The names of the rewards to measure; the first is the score. Empty: the trained rewards."""
    scheduler: str | None = None
    """The sampler of evaluations; null: as in rollouts."""
    steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """The number of sampling steps of evaluations; null: as in rollouts."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """The scale of classifier-free guidance in evaluations; null: as in rollouts."""
    limit: int | None = Field(default=None, ge=1)
    """The number of held-out prompts to use, from the first; null: all."""
    batch: int = Field(default=256, ge=1)
    """The number of pictures in one call of the pipeline, in each process."""
    at_start: bool = True
    """Evaluate the base model before training."""

    def due(self, iteration: int) -> bool:
        """Return whether to evaluate after an iteration; iterations count from 1."""
        return iteration in self.at or is_multiple(iteration, self.every)

    def count(self, iterations: int) -> int:
        """Return the number of evaluations in a run, the one at its end included."""
        regular = (iterations - 1) // self.every if self.every else 0
        more = sum(at < iterations and not is_multiple(at, self.every) for at in set(self.at))
        return int(self.at_start) + regular + more + 1


@dataclass(frozen=True)
class EvalSampling:
    """How evaluations sample: by the settings of ``eval``, and of ``rollout`` where these are null.

    Args:
        scheduler: the sampler's name; None for the pipeline's own.
        steps: the number of sampling steps.
        guidance_scale: the scale of classifier-free guidance; 1 for none.
        batch: the number of pictures in one call of the pipeline.
    """

    scheduler: str | None
    steps: int
    guidance_scale: float
    batch: int


class CheckpointSettings(Settings):
    every: int = Field(default=50, ge=0)
    """The number of iterations between checkpoints; 0: save at the end only."""
    keep_last: int = Field(default=2, ge=1)
    """How many of the latest checkpoints to keep; with 2, a damaged one leaves another."""
    keep_best: int = Field(default=1, ge=0)
    """How many more to keep for their held-out score; an evaluation that is better than all before
    it makes a checkpoint."""

    def due(self, iteration: int, is_best: bool = False) -> bool:
        """Return whether to save after an iteration.

        Args:
            iteration: counted from 1.
            is_best: whether its evaluation is better than all before it.
        """
        return is_multiple(iteration, self.every) or (self.keep_best > 0 and is_best)


class GuardSettings(Settings):
    nonfinite: int = Field(default=3, ge=1)
    """Stop the run after so many optimiser steps in a row whose loss or gradients are not finite,
    and save the batch in its folder. Each such step is left out."""
    collapse: int = Field(default=10, ge=0)
    """Warn after so many iterations in a row in which no group's rewards differ; 0: never."""
    falling: int = Field(default=3, ge=0)
    """Warn when a measure of eval.metrics that is not trained fell in so many evaluations in a row
    and lies below its first value; 0: never."""
    gradient_spike: float = Field(default=10.0, ge=0)
    """Warn when the gradient norm is so many times the median of the last 20; 0: never."""
    rollout_distance: float = Field(default=0.3, ge=0)
    """Warn when inexact rollouts (rollout.accelerate) are so far from the exact ones, in units of
    the spread within a group; 0: never."""
    clipped: float = Field(default=0.9, ge=0, le=1)
    """Warn when this share of the samples had their gradient clipped in 10 iterations in a row;
    0: never."""
    hang_minutes: float = Field(default=30.0, ge=0)
    """How many minutes a process may keep the others waiting; then the run ends and names it.
    0: forever."""
    stop: bool = False
    """Let collapsed rewards or a falling measure end the run early, with the best checkpoint's
    weights as its result."""


class SampleSettings(Settings):
    count: int = Field(default=16, ge=0)
    """The number of pictures in each grid, of fixed prompts and seeds; 0: no grids."""
    every: int | None = Field(default=None, ge=0)
    """The number of iterations between grids; null: as eval.every; 0: only before and after."""
    video: Literal["mp4", "gif"] = "mp4"
    """The format of the video files beside the grids; mp4 needs dgpo[media]."""
    fps: int = Field(default=16, ge=1)
    """The frames per second of these files."""


def _loggers(value: Any) -> list[str | dict[str, dict[str, Any]]]:
    """Entries of ``run.loggers``, each a name or ``{name: options}``, from one or several."""
    if value in (None, "none"):
        return []
    found: dict[str, dict[str, Any]] = {}
    for entry in value if isinstance(value, (list, tuple)) else [value]:
        pairs = entry.items() if isinstance(entry, Mapping) else [(entry, {})]
        for name, given in pairs:
            given = {} if given is None else given
            if not isinstance(name, str) or not isinstance(given, Mapping):
                raise ValueError(
                    f"run.loggers = {masked(value)!r:.80}: should hold names, or names with "
                    "options, such as [tensorboard, {wandb: {project: mine}}]"
                )
            if not known("logger", name):
                raise ValueError(f"run.loggers: {unknown('logger', name)}")
            if name in found:
                raise ValueError(f"run.loggers: {name!r} is named twice")
            for place in secrets_in(given, f"run.loggers.{name}"):
                raise ValueError(
                    f"{place} would be written into the run's folder: log in by the tracker's own "
                    "command, or put it into an environment variable (docs/logging.md)"
                )
            found[name] = dict(given)
    return [{name: options} if options else name for name, options in found.items()]


class RunSettings(Settings):
    dir: str = Field(default="runs/run", min_length=1)
    """The run's folder; a recipe file's default is runs/<its name>."""
    name: str | None = Field(default=None, min_length=1)
    """The run's name for loggers; null: the name of the folder."""
    loggers: Annotated[list[str | dict[str, dict[str, Any]]], BeforeValidator(_loggers)] = Field(
        default=["tensorboard"]
    )
    """Where figures, grids and tables go beside the run's folder (docs/logging.md): tensorboard,
    wandb, trackio, swanlab, jsonl, csv, or a class of your own; an entry may hold options, such as
    {wandb: {project: mine}}; []: nowhere."""
    callbacks: list[str] = Field(default_factory=list)
    """Callbacks of your own, as package.module:Class or path/to/file.py:Class."""
