"""Collect: the pictures of an iteration, their rewards, and the batch that can teach."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Protocol

import torch
from torch import Tensor

from dgpo.algorithms.base import TrajectoryAlgorithm
from dgpo.core.process import Level
from dgpo.core.seeds import seed_for
from dgpo.distributed.assignment import Assignment
from dgpo.distributed.lockstep import Turn, turns
from dgpo.distributed.processes import SINGLE, Processes
from dgpo.errors import UserError
from dgpo.media import Lost, made_of
from dgpo.models.accelerate import Accelerated, distance
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.pipeline.row_groups import joined
from dgpo.models.policy import Policy, RollingWeights
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.models.samplers.sde_schedulers import make_sde_scheduler, with_noise
from dgpo.prompts import Prompt
from dgpo.recipe import Recipe
from dgpo.rewards import RewardSet, Scored
from dgpo.rewards.call_limits import in_thread
from dgpo.rewards.scoring import Scoring
from dgpo.rollouts.engine import LocalEngine, RolloutEngine, RolloutRequest
from dgpo.training.batch import Batch, build_batch
from dgpo.training.prefetched import Prefetched, PrefetchedRollout, pack, unpack

_CHANGES_NO_PICTURE = {"ahead", "batch", "overlap_rewards", "engine"}
"""The keys of ``rollout`` that say when and where pictures are made, not which."""


class Sampler(Protocol):
    """What makes pictures: the policy, or a model that is not trained."""

    model: PipelineModel

    @property
    def sharded(self) -> bool:
        """Return whether every process must take part in every pass."""
        ...

    def rolling(self, weights: RollingWeights = "policy") -> AbstractContextManager[None]:
        """Put weights in place for rollouts."""
        ...


@dataclass(frozen=True)
class Asked:
    """The groups of an iteration, before their pictures are made.

    Args:
        prompts: one row for each of all groups.
        assignment: which pictures are this process's.
        cond: the embeddings of the groups that this process has pictures of.
        scoring: asks the rewards as soon as pictures are there.
    """

    prompts: Sequence[Prompt]
    assignment: Assignment
    cond: Conditioning
    scoring: Scoring


@dataclass(frozen=True)
class Sampled:
    """This process's pictures of an iteration, and the seconds that sampling took.

    Args:
        asked: what was asked for.
        rollout: the pictures.
        seconds: how long the loop has waited for them.
        hidden: how many more seconds an engine has worked while the policy was trained.
    """

    asked: Asked
    rollout: Rollout
    seconds: float
    hidden: float = 0.0


@dataclass(frozen=True)
class _Apart:
    """Iterations whose pictures an engine makes while the policy is trained.

    Args:
        asked: what was asked for, by iteration.
        during: the iteration that is trained.
        made: their pictures, and the seconds that each took.
    """

    asked: dict[int, Asked]
    during: int
    made: Future[dict[int, tuple[Rollout, float]]]


@dataclass(frozen=True)
class Collected:
    """What an iteration trains on, and what was seen on the way to it.

    Args:
        batch: None if no group can teach.
        figures: columns of ``metrics.jsonl``.
        seconds: by stage (``rollout``, ``reward``).
        images: this process's B pictures, as the pipeline gave them; empty where they were ranked
            before the run.
        prompts: their B texts.
        rewards: what each reward says of them, float32 [B]; NaN where it was not asked.
        advantages: [B]; 0 in a group without spread, NaN in one that a reward has failed, or of
            which a picture is lost.
    """

    batch: Batch | None
    figures: dict[str, float]
    seconds: dict[str, float]
    images: Sequence[Any] = ()
    prompts: Sequence[str] = ()
    rewards: dict[str, Tensor] | None = None
    advantages: Tensor | None = None


class Collector:
    """Samples ``group_size`` pictures of each prompt, scores them, and keeps what can teach.

    With the recipe's seed, the iteration fixes every random number. With ``rollout.ahead`` = N the
    pictures of the next N iterations are sampled early, by the weights of the moment, so that slow
    rewards have something to look at while the policy is updated. An engine makes them while the
    policy is updated. A checkpoint keeps these pictures, because the weights that made them are
    gone.

    Args:
        recipe: sampler, sizes and seed of the run.
        policy: makes the pictures.
        rewards: are asked about them.
        prompts: from an iteration, counted from 0, to its rows, one a group.
        engine: another program that samples for the policy; None for the policy's own pipeline.
        processes: each makes its share of the pictures and asks the rewards about it; what is
            compared are the numbers of all.

    Raises:
        UserError: the sampler does not fit the pipeline.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Sampler,
        rewards: RewardSet,
        prompts: Callable[[int], Sequence[Prompt]],
        engine: RolloutEngine | None = None,
        processes: Processes = SINGLE,
    ) -> None:
        self._recipe, self._policy, self._rewards = recipe, policy, rewards
        self._prompts, self._processes = prompts, processes
        self._scheduler = rollout_scheduler(recipe, policy.model.pipe.scheduler)
        self._inexact = self._accelerated()
        self._engine = engine or LocalEngine(self._inexact or policy)
        self._sampled: dict[int, Sampled] = {}
        self._early: dict[int, PrefetchedRollout] = {}
        """What earlier weights have made, until the iteration after its own."""
        self._apart: _Apart | None = None
        self._scoring: Scoring | None = None
        """The last that was begun."""

    def __call__(self, iteration: int) -> Collected:
        """What an iteration trains on. Collective.

        Args:
            iteration: counted from 0; after an error the same one may be asked for again.

        Raises:
            UserError: the samples are not finite, or a reward's answer is unusable.
        """
        figures = self._distance(iteration)
        # What this iteration has sampled before an error is sampled again, by the same weights:
        # the figures of the iteration then count it as if there had been no error.
        self._take_in(iteration)
        self._early = self._kept(iteration)
        for one in self._sampled.keys() - self._early.keys():
            self._sampled.pop(one).asked.scoring.end()
        last = min(iteration + self._recipe.rollout.ahead, self._recipe.train.iterations - 1)
        missing = []
        for one in range(iteration, last + 1):
            if one in self._sampled:
                continue
            if one in self._early:
                self._sampled[one] = self._show(one)
            elif one > iteration and self._engine.apart:
                missing.append(one)
            else:
                made = self._sampled[one] = self.sample(one)
                if one > iteration:
                    self._early[one] = PrefetchedRollout(made.rollout, made.seconds, iteration)
        if missing:
            self._apart = self._begin(missing, iteration)
        collected = self.score(self._sampled.pop(iteration))
        spent = collected.seconds["rollout"] + figures.get("seconds_rollout_check", 0.0)
        seconds = {**collected.seconds, "rollout": spent}
        return replace(collected, figures={**collected.figures, **figures}, seconds=seconds)

    def sample(self, iteration: int) -> Sampled:
        """Make the pictures, and show them to those rewards that take time. Collective.

        Raises:
            UserError: the samples are not finite, or a reward has failed already.
        """
        began = monotonic()
        with ExitStack() as on_error:
            asked = self._ask(iteration, on_error)
            with self._engine.holding(self._weights(iteration)):
                rollout = self._roll(iteration, asked, self._batches(asked))
            on_error.pop_all()
        return Sampled(asked, rollout, monotonic() - began)

    def score(self, made: Sampled) -> Collected:
        """Wait for the rewards, and choose what can teach. Collective.

        Raises:
            UserError: a reward's answer is unusable, or all pictures are lost.
        """
        began, asked, assignment = monotonic(), made.asked, made.asked.assignment
        with asked.scoring as scoring:
            scored, lost = _of_all(scoring.finish(), made.rollout.images or (), assignment)
        waited = monotonic() - began
        found = build_batch(self._recipe, scored, made.rollout, asked.cond, assignment)
        figures = {**found.figures, "samples_lost": float(lost)}
        if self._recipe.rollout.engine and self._recipe.rollout.ahead:
            figures["seconds_rollout_hidden"] = made.hidden
        if self._recipe.overlaps_rewards:
            figures["seconds_reward_hidden"] = max(0.0, scoring.seconds - waited)
        return Collected(
            batch=found.batch,
            figures=figures,
            seconds={"rollout": made.seconds, "reward": waited},
            images=[made_of(image) for image in made.rollout.images or ()],
            prompts=[asked.prompts[group].text for group in assignment.groups.tolist()],
            rewards={name: of_all[assignment.mine] for name, of_all in scored.by_name.items()},
            advantages=found.advantages[assignment.mine],
        )

    def pending(self, iteration: int) -> Prefetched:
        """What a checkpoint has to keep beside the weights. Collective.

        Args:
            iteration: the next one.
        """
        if self._apart is not None and self._apart.during < iteration:
            wait([self._apart.made])
            whole = self._apart.made.exception() is None
            # what one process lacks all sample again; the error is raised when it is needed
            if all(self._processes.all_gather_object(whole, "what was sampled ahead")):
                self._take_in(iteration)
        kept = self._kept(iteration)
        shares = {one: self._assignment(self._prompts(one)) for one in kept}
        return pack(kept, shares, {one: self._made_for(one) for one in kept})

    def restore(self, saved: Prefetched) -> list[str]:
        """Go on with what a checkpoint has kept. Pictures of other prompts or settings than the
        recipe's are left aside, and sampled when their iteration comes.

        Returns:
            a sentence if some were.
        """
        device, other = self._policy.model.device, []
        for iteration in map(int, saved.facts):
            if saved.facts[str(iteration)]["made_for"] != self._made_for(iteration):
                other.append(iteration + 1)
                continue
            assignment = self._assignment(self._prompts(iteration))
            self._early[iteration] = unpack(saved, iteration, assignment, device)
        if not other:
            return []
        which = ", ".join(map(str, other))
        return [
            f"left aside: what was sampled ahead for iteration {which} has other prompts or rollout"
            " settings than the recipe"
        ]

    def _ask(self, iteration: int, on_error: ExitStack) -> Asked:
        """An iteration's groups; after an error its rewards are not asked any more."""
        recipe, prompts = self._recipe, self._prompts(iteration)
        assignment = self._assignment(prompts)
        guided = recipe.rollout.guidance_scale != 1 or recipe.algorithm.kl_guidance is not None
        model = self._policy.model
        cond = model.encode(_texts(prompts, assignment), guidance=guided)
        last = iteration + 1 == recipe.train.iterations
        if following := () if last else self._prompts(iteration + 1):  # recordings end sooner
            model.prefetch(_texts(following, self._assignment(following)))
        # people answer when their iteration comes; until then they may change their minds
        people = recipe.rollout.ahead > 0 and bool(self._rewards.names_with("asks_people"))
        overlap, groups = recipe.overlaps_rewards and not people, assignment.groups.tolist()
        size, before = recipe.group_size, self._scoring
        scoring = Scoring(self._rewards, prompts, size, overlap, groups, before)
        self._scoring = on_error.enter_context(scoring)
        return Asked(prompts, assignment, cond, scoring)

    def _begin(self, iterations: Sequence[int], during: int) -> _Apart:
        """Have the engine make the pictures of later iterations."""
        with ExitStack() as on_error:
            asked = {one: self._ask(one, on_error) for one in iterations}
            batches = {one: [*self._batches(given)] for one, given in asked.items()}
            with self._engine.holding(self._weights(during)):
                pass  # the engine has the weights now, and keeps them

            def make() -> dict[int, tuple[Rollout, float]]:
                made = {}
                for one in iterations:
                    began = monotonic()
                    made[one] = self._roll(one, asked[one], batches[one], True), monotonic() - began
                return made

            on_error.pop_all()
        return _Apart(asked, during, in_thread(make, name="rollouts ahead"))

    def _take_in(self, iteration: int) -> None:
        """Wait for what an engine was asked for before this iteration; the rest is left.

        Raises:
            UserError: the engine has failed.
        """
        apart = self._apart
        if apart is None:
            return
        began = monotonic()
        wait([apart.made])
        waited, self._apart = monotonic() - began, None
        if apart.during >= iteration:
            for asked in apart.asked.values():
                asked.scoring.end()
            return
        for one, (rollout, seconds) in apart.made.result().items():
            self._early[one] = PrefetchedRollout(rollout, seconds, apart.during)
            hidden = max(0.0, seconds - waited)
            self._sampled[one] = Sampled(apart.asked[one], rollout, min(waited, seconds), hidden)
            waited = max(0.0, waited - seconds)

    def _show(self, iteration: int) -> Sampled:
        """Pictures that were sampled early; rewards are asked about the same batches again."""
        early = self._early[iteration]
        images = early.made.images or []
        with ExitStack() as on_error:
            asked = self._ask(iteration, on_error)
            for rows in asked.assignment.batches(self._recipe.rollout.batch):
                asked.scoring.add([images[row] for row in rows.tolist()])
            on_error.pop_all()
        return Sampled(asked, early.made, early.seconds)

    def _batches(self, asked: Asked) -> Iterator[Turn]:
        """The passes that make this process's pictures. Collective, each of them."""
        most = max(map(len, asked.assignment.places))  # as many batches in every process
        size = self._recipe.rollout.batch or math.ceil(most / self._engine.servers)
        every = turns(asked.assignment.batches(size), self._policy.sharded)
        return (turn for turn in every if len(turn.rows))

    def _roll(
        self, iteration: int, asked: Asked, batches: Iterable[Turn], go_on: bool = False
    ) -> Rollout:
        """This process's pictures, batch by batch."""
        passes: list[Turn] = []

        def requests() -> Iterator[RolloutRequest]:
            for turn in batches:
                passes.append(turn)
                yield self._request(iteration, asked, turn.rows)

        parts: list[Rollout] = []
        rows: list[Tensor] = []
        for number, part in enumerate(self._engine.rollouts(requests())):
            if passes[number].counts:
                parts.append(part)
                rows.append(passes[number].rows)
                asked.scoring.add(part.images or (), go_on)
        rollout = joined(parts, rows)
        if self._levels is not None:
            rollout = replace(rollout, levels=self._levels)
        if not bool(torch.isfinite(rollout.x0).all()):
            raise UserError(
                f"iteration {iteration + 1}: the sampler returned numbers that are not finite, so "
                "the weights have diverged: lower train.lr and go on from the last checkpoint"
            )
        return rollout

    def _request(self, iteration: int, asked: Asked, rows: Tensor) -> RolloutRequest:
        """Some rows of this process. A row's noise depends on its place in the iteration alone,
        so that neither batches nor processes change a picture."""
        rollout, seed, scheduler = self._recipe.rollout, self._recipe.seed, self._scheduler
        assignment = asked.assignment
        places, groups = assignment.mine[rows].tolist(), assignment.rows[rows]
        noisy, recorded = self._noisy_steps(iteration)
        if noisy:
            seeds = [seed_for(seed, "sde", iteration, place) for place in places]
            scheduler = with_noise(scheduler, noisy, seeds)
        held = assignment.held[groups].tolist()
        return RolloutRequest(
            texts=[asked.prompts[group].text for group in held],
            cond=asked.cond.rows(groups),
            seeds=[seed_for(seed, "rollout", iteration, place) for place in places],
            steps=self._steps,
            guidance_scale=rollout.guidance_scale,
            scheduler=scheduler,
            record=recorded,
        )

    @property
    def _steps(self) -> int:
        """The sampling steps of the rollouts."""
        own = self._recipe.rollout.accelerate
        return self._recipe.rollout.steps if own is None or own.steps is None else own.steps

    def _accelerated(self) -> Accelerated | None:
        """The policy with ``rollout.accelerate``, once it has been tried, if the recipe has it."""
        recipe, policy, own = self._recipe, self._policy, self._recipe.rollout.accelerate
        self._levels: list[Level] | None = None
        """The noise levels of exact rollouts, where those that are made have others."""
        if own is None:
            return None
        if not isinstance(policy, Policy):
            raise UserError("rollout.accelerate: only training has it, use null")
        made = Accelerated(policy, own)
        cond = self._repeated(self._prompts(0)[0], 1)
        made.trial(lambda: self._latents(cond, self._steps, [0], record=True))
        if own.steps is not None:
            self._levels = self._latents(cond, recipe.rollout.steps, [0]).levels
        return made

    def _distance(self, iteration: int) -> dict[str, float]:
        """How far inexact rollouts are from exact ones of the same noise, when it is looked at.

        Every process samples the whole of the iteration's first group, so that all find the same
        number, however many they are.
        """
        recipe, own = self._recipe, self._recipe.rollout.accelerate
        if own is None or self._inexact is None or iteration % own.check_every:
            return {}
        began, size = monotonic(), recipe.group_size
        cond = self._repeated(self._prompts(iteration)[0], size)
        seeds = [seed_for(recipe.seed, "rollout", iteration, place) for place in range(size)]
        found = []
        for sampler, steps in (self._inexact, self._steps), (self._policy, recipe.rollout.steps):
            with sampler.rolling(self._weights(iteration)):
                parts = [
                    self._latents(cond.rows(rows), steps, [seeds[row] for row in rows.tolist()])
                    for rows in torch.arange(size).split(recipe.rollout.batch or size)
                ]
            found.append(torch.cat([part.x0 for part in parts]))
        figures = {"rollout_distance": distance(*found)}
        return {**figures, "seconds_rollout_check": monotonic() - began}

    def _repeated(self, prompt: Prompt, count: int) -> Conditioning:
        """The embeddings of a prompt, in so many rows."""
        guided = self._recipe.rollout.guidance_scale != 1
        cond = self._policy.model.encode([prompt.text], guidance=guided)
        return cond.rows(torch.zeros(count, dtype=torch.long))

    def _latents(
        self, cond: Conditioning, steps: int, seeds: Sequence[int], record: bool = False
    ) -> Rollout:
        """What the sampler makes of these seeds by the weights in place, not decoded."""
        return self._policy.model.rollout(
            cond,
            steps=steps,
            guidance_scale=self._recipe.rollout.guidance_scale,
            scheduler=self._scheduler,
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
            decode=False,
            record=record,
        )

    def _noisy_steps(self, iteration: int) -> tuple[range, range]:
        """The steps at which the sampler adds noise, and those whose tensors are kept."""
        recipe = self._recipe
        if isinstance(recipe.algorithm, TrajectoryAlgorithm):
            noisy = recipe.algorithm.noisy_steps(recipe.rollout.steps, iteration, recipe.seed)
            return noisy, noisy
        return range(0 if recipe.rollout.sde is None else recipe.rollout.steps - 1), range(0)

    def _weights(self, iteration: int) -> RollingWeights:
        """Which weights make an iteration's rollouts."""
        switch = self._recipe.rollout.switch_to_old_after
        if switch is not None and iteration >= switch:
            return "old"
        return self._recipe.algorithm.samples_from

    def _kept(self, iteration: int) -> dict[int, PrefetchedRollout]:
        """What was sampled before an iteration, for it and for later ones."""
        kept = self._early.items()
        return {one: early for one, early in kept if early.during < iteration <= one}

    def _assignment(self, prompts: Sequence[Prompt]) -> Assignment:
        algorithm = self._recipe.algorithm
        parts = algorithm.updates if isinstance(algorithm, TrajectoryAlgorithm) else 1
        return Assignment.of(len(prompts), self._recipe.group_size, parts, self._processes)

    def _made_for(self, iteration: int) -> Any:
        """What the pictures of an iteration depend on beside the weights, as JSON reads it back."""
        recipe = self._recipe
        rollout = recipe.rollout.model_dump(mode="json", exclude=_CHANGES_NO_PICTURE)
        asked = [prompt.text for prompt in self._prompts(iteration)]
        facts = {"prompts": asked, "group_size": recipe.group_size, "seed": recipe.seed}
        return json.loads(json.dumps({**facts, "rollout": rollout}))


def rollout_scheduler(recipe: Recipe, base: Any) -> Any:
    """The sampler of the rollouts: the algorithm's or ``rollout.sde`` if one of them is
    stochastic, else ``rollout.scheduler``.

    Args:
        recipe: the settings of the run.
        base: the scheduler of the pipeline.

    Raises:
        UserError: it does not fit the pipeline.
    """
    if isinstance(recipe.algorithm, TrajectoryAlgorithm):
        return make_sde_scheduler(recipe.algorithm.sde, base)
    if recipe.rollout.sde is not None:
        return make_sde_scheduler(recipe.rollout.sde, base, "rollout.sde")
    return make_scheduler(recipe.rollout.scheduler, base)


def _texts(prompts: Sequence[Prompt], assignment: Assignment) -> list[str]:
    """The prompts of the groups that this process has pictures of."""
    return [prompts[group].text for group in assignment.held.tolist()]


def _of_all(scored: Scored, images: Sequence[Any], assignment: Assignment) -> tuple[Scored, int]:
    """What all processes have scored, in the order of the places, and how many pictures are lost.
    Collective.

    Raises:
        UserError: all are.
    """
    gone = torch.tensor([isinstance(image, Lost) for image in images]).to(scored.weights)
    beside = torch.cat([scored.weights, gone[:, None]], 1)
    values, lost = assignment.gather({**scored.by_name, "": beside}, scored.lost)
    beside = values.pop("")
    if bool(beside[:, -1].all()):
        raise UserError(
            f"every picture of an iteration is lost: {next(iter(lost.values()))}; where a decoder "
            "overflows, memory.vae_precision: float32 helps"
        )
    return Scored(values, beside[:, :-1], lost), int(beside[:, -1].sum())
