"""What a :class:`dgpo.trainer.Trainer` is built of: rewards, prompts, the model, the collector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dgpo.distributed.processes import Processes
from dgpo.errors import UserError
from dgpo.evaluation import Metrics
from dgpo.media import Video, check_format
from dgpo.models.load import check_vae, dtype_of, load_pipeline
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.arguments import denoisers_of
from dgpo.models.pipeline.self_check import self_check
from dgpo.models.policy import Policy
from dgpo.models.samplers.sde_schedulers import SdeScheduler
from dgpo.models.weights.memory import save_memory
from dgpo.prompts import Prompt, PromptSampler, load_prompts, refuse_sizes
from dgpo.recipe import Recipe
from dgpo.rewards import RewardSet, load_rewards
from dgpo.training.agreement import place
from dgpo.training.arguments import is_pipeline
from dgpo.training.checkpoints import RunCheckpoints
from dgpo.training.collection import rollout_scheduler
from dgpo.training.collector import Collector
from dgpo.training.held_out import HeldOut, eval_sampler
from dgpo.training.offline import RankedCollector, ranked_prompts


@dataclass(frozen=True)
class Data:
    """What is learned and measured, and on which prompts."""

    rewards: RewardSet
    metrics: Metrics
    prompts: Sequence[Prompt]
    eval_prompts: list[Prompt]
    offline: bool
    """Whether the prompts are those of groups that were ranked before."""

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in (*self.prompts, *self.eval_prompts)]


def load_data(
    recipe: Recipe, reward_funcs: Any = None, train_dataset: Any = None, eval_dataset: Any = None
) -> Data:
    """Load rewards, metrics and prompts, and let the first two refuse the third.

    Args:
        recipe: of the run.
        reward_funcs, train_dataset, eval_dataset: as of the trainer; None for the recipe's.

    Raises:
        UserError: something is missing or does not fit.
    """
    offline = recipe.data.preferences is not None
    if offline and train_dataset is not None:
        raise UserError("train_dataset: data.preferences brings its own prompts; give one")
    asked = recipe.rewards if reward_funcs is None else reward_funcs
    rewards = load_rewards(asked) if asked or not offline else RewardSet([])
    metrics = Metrics(recipe.eval.metrics or rewards)
    source, held_out = recipe.prompts.train, recipe.prompts.eval
    prompts: Sequence[Prompt] = (
        ranked_prompts(recipe)
        if offline
        else load_prompts(source if train_dataset is None else train_dataset)
    )
    held_out = held_out if eval_dataset is None else eval_dataset
    eval_prompts = [] if held_out is None else load_prompts(held_out)[: recipe.eval.limit]
    refuse_sizes([*([] if offline else prompts), *eval_prompts], recipe.rollout.call)
    if eval_prompts and not metrics.names:
        raise UserError("eval.metrics is missing: what shall be measured on prompts.eval?")
    if recipe.memory.offload_rewards:
        rewards.offload()
        metrics.offload()
    if not offline:
        rewards.check(prompts)
    metrics.check(eval_prompts)
    return Data(rewards, metrics, prompts, eval_prompts, offline)


def load_model(
    recipe: Recipe,
    model: Any,
    checkpoints: RunCheckpoints,
    processes: Processes,
    texts: Sequence[str],
) -> PipelineModel:
    """The pipeline where this process computes, sharded and saving memory as the recipe says.

    Args:
        recipe: of the run.
        model: a pipeline, which stays where it is, or anything else for the recipe's.
        checkpoints: see the weights before anything is done to them.
        processes: of the run.
        texts: of all prompt rows.

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
    return made


def check_model(
    recipe: Recipe, model: PipelineModel, prompts: Sequence[Prompt], scheduler: Any
) -> None:
    """See that training would train what samples: with the run's own samplers and guidance.

    Args:
        recipe: of the run.
        model: before any weight is trained.
        prompts: a few, with which it is tried.
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
    cond = model.encode([prompt.text for prompt in prompts], guidance=True)
    rollout = recipe.rollout
    self_check(model, cond, samplers, rollout.guidance_scale, rollout.steps)


def make_policy(recipe: Recipe, model: PipelineModel, texts: Sequence[str]) -> Policy:
    """The model with the weights that are trained, and what makes its rollouts.

    Args:
        recipe: of the run.
        model: the untrained one.
        texts: all prompts, for which its text encoders are asked before they are freed, if they
            shall be.

    Raises:
        UserError: a LoRA target, the device of snapshots or the engine does not fit.
    """
    policy = Policy(model, recipe.lora, recipe.seed, snapshot_device=recipe.memory.snapshot_device)
    if recipe.rollout.engine is not None:
        from dgpo.rollouts.remote import RemoteEngine

        policy.engine = RemoteEngine(policy, recipe.rollout.engine, recipe.rollout.scheduler)
    if recipe.memory.free_text_encoders:
        model.encode_and_free(texts)
    return policy


def try_rewards(recipe: Recipe, data: Data, held_out: HeldOut) -> None:
    """Score two pictures: a reward that answers nonsense must not cost the first rollouts.

    Args:
        recipe: of the run.
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
            if recipe.samples.count and isinstance(made[0], Video):
                check_format(recipe.samples.video)
            score(made, rows)


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
        scheduler: the deterministic sampler.
    """
    algorithm, model = recipe.algorithm, policy.model
    if data.offline:
        return RankedCollector(model, algorithm, sampler, recipe, scheduler, processes)
    noisy = rollout_scheduler(recipe, model.pipe.scheduler)
    return Collector(policy, data.rewards, algorithm, sampler, recipe, noisy, processes)
