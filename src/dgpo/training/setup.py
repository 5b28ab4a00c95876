"""What a :class:`dgpo.trainer.Trainer` is built of: rewards, prompts, the model, the collector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dgpo.distributed.processes import Processes
from dgpo.media import Lost, Video, check_format, made_of
from dgpo.models.load import check_vae, dtype_of, load_pipeline
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.arguments import denoisers_of
from dgpo.models.pipeline.self_check import self_check
from dgpo.models.policy import Policy
from dgpo.models.samplers.sde_schedulers import SdeScheduler
from dgpo.models.weights.compute import set_up
from dgpo.models.weights.memory import save_memory
from dgpo.prompts import PromptSampler
from dgpo.recipe import Recipe
from dgpo.run.tracking import read_history
from dgpo.training.agreement import place
from dgpo.training.arguments import is_pipeline
from dgpo.training.checkpoints import RunCheckpoints
from dgpo.training.collector import Collector, rollout_scheduler
from dgpo.training.data import Data
from dgpo.training.held_out import HeldOut, eval_sampler
from dgpo.training.offline import RankedCollector
from dgpo.training.state import TrainerState
from dgpo.training.updater import Updater


def load_model(
    recipe: Recipe,
    model: Any,
    checkpoints: RunCheckpoints,
    processes: Processes,
    texts: Sequence[str],
) -> PipelineModel:
    """The pipeline where this process computes, sharded and saving memory as the recipe says.

    Args:
        recipe: the settings of the run.
        model: a pipeline, which stays where it is, or anything else for the recipe's.
        checkpoints: see the weights before anything is done to them.
        processes: the processes of the run.
        texts: the texts of all prompt rows.

    Raises:
        UserError: it cannot be loaded, or not be trained.
    """
    given, memory = is_pipeline(model), recipe.memory
    pipe = model
    if not given:
        pipe = load_pipeline(
            recipe.model, recipe.precision, memory.quantization, memory.vae_precision
        )
    elif memory.vae_precision is not None:
        check_vae(pipe, dtype_of(memory.vae_precision))
    checkpoints.look_at(pipe.components)
    place(pipe, denoisers_of(pipe), recipe, processes, not given, texts)
    made = PipelineModel(
        pipe,
        call=recipe.rollout.call,
        prompt_cache=recipe.prompt_cache,
        processes=processes,
    )
    save_memory(pipe, made.denoisers, recipe.memory)
    set_up(made.denoisers, recipe.compute)
    return made


def check_model(recipe: Recipe, model: PipelineModel, data: Data, scheduler: Any) -> None:
    """See that training would train what samples: with the run's own samplers and guidance.

    Args:
        recipe: the settings of the run.
        model: before any weight is trained.
        data: its prompts, with a few of which the model is tried.
        scheduler: the deterministic sampler.

    Raises:
        UserError: it would not, or a sampler does not fit the pipeline; see
            :func:`dgpo.models.pipeline.self_check.self_check`.
    """
    samplers = [scheduler]
    if recipe.data.preferences is None:
        noisy = rollout_scheduler(recipe, model.pipe.scheduler)
        samplers += [noisy] if isinstance(noisy, SdeScheduler) else []
    if recipe.eval.scheduler is not None:
        samplers.append(eval_sampler(recipe.eval.scheduler, model.pipe.scheduler))
    cond = model.encode([prompt.text for prompt in data.prompts[:2]], guidance=True)
    rollout = recipe.rollout
    self_check(model, cond, samplers, rollout.guidance_scale, rollout.steps)
    model.check_pictures(data.texts)


def make_policy(recipe: Recipe, model: PipelineModel) -> Policy:
    """The model with the weights that are trained.

    Raises:
        UserError: a LoRA target or the device of snapshots does not fit.
    """
    return Policy(model, recipe.lora, recipe.seed, snapshot_device=recipe.memory.snapshot_device)


def encode_prompts(
    recipe: Recipe,
    model: PipelineModel,
    data: Data,
    sampler: PromptSampler,
    held_out: HeldOut,
    processes: Processes,
) -> None:
    """Free the text encoders after they are asked for all prompts that the run will draw, or keep
    them off the device, as the recipe says. Collective.

    Raises:
        UserError: the pipeline needs them at every call.
    """
    if not recipe.memory.free_text_encoders:
        if recipe.memory.offload_text_encoders:
            model.offload_text_encoders()
        return
    drawn = (prompt for n in range(recipe.train.iterations) for prompt in sampler.at(n))
    tried = (*data.prompts[:1], *data.prompts[-1:])
    rows = (*tried, *drawn, *data.eval_prompts, *held_out.shown)
    model.encode_and_free((row.text for row in rows), processes)


def try_rewards(recipe: Recipe, data: Data, held_out: HeldOut) -> None:
    """Score two pictures: a reward that answers nonsense must not cost the first rollouts.

    Args:
        recipe: the settings of the run.
        data: its rewards, metrics and prompts.
        held_out: makes the pictures.

    Raises:
        UserError: a reward's answer is unusable, or a sample cannot be written.
    """
    for score, prompts in (
        (data.rewards.trial, [] if data.offline else data.prompts),
        (data.metrics.of_each, data.eval_prompts),
    ):
        if rows := [*prompts[:1], *prompts[-1:]]:
            made = held_out.sample(rows)
            if recipe.samples.count and isinstance(made_of(made[0]), Video):
                check_format(recipe.samples.video)
            there = [pair for pair in zip(made, rows, strict=True) if not isinstance(pair[0], Lost)]
            if there:
                score(*map(list, zip(*there, strict=True)))


def make_collector(
    recipe: Recipe,
    data: Data,
    sampler: PromptSampler,
    policy: Policy,
    scheduler: Any,
    processes: Processes,
) -> Collector | RankedCollector:
    """What gives each iteration its batch: the policy's own pictures, or ranked ones.

    Args:
        recipe: the settings of the run.
        data: its rewards.
        sampler: draws each iteration's prompts.
        policy: samples.
        scheduler: the deterministic sampler.
        processes: the processes of the run.

    Raises:
        UserError: a sampler or the engine does not fit.
    """
    if data.offline:
        return RankedCollector(policy.model, recipe, sampler, scheduler, processes)
    engine = None
    if recipe.rollout.engine is not None:
        from dgpo.rollouts.remote import RemoteEngine  # it needs httpx

        folder = Path(recipe.run.dir) / f"engine-{processes.rank}"
        urls, sampler_name = recipe.rollout.engine, recipe.rollout.scheduler
        engine = RemoteEngine(policy, urls, sampler_name, folder)
    return Collector(recipe, policy, data.rewards, sampler.at, engine, processes)


def restored_state(
    checkpoints: RunCheckpoints, updater: Updater, collector: Collector | RankedCollector
) -> TrainerState:
    """The state that a run begins or goes on with. Weights and optimiser are put back. Collective.

    Args:
        checkpoints: the checkpoints of the run.
        updater: gets weights and moments.
        collector: gets the pictures that were sampled early.

    Raises:
        UserError: the checkpoint belongs to other settings.
    """
    recipe, processes = updater.recipe, updater.processes
    state = TrainerState(recipe, processes.main, phase=checkpoints.start)
    counters, early = checkpoints.restore(updater)
    if counters:
        state.read_json(counters)
        # only the main process can read the folder, and all must decide by the same figures
        state.log_history = processes.broadcast_object(
            lambda: read_history(state.folder, state.iteration), "the run's history"
        )
    state.news = [*updater.policy.news, *collector.restore(early)]
    return state
