"""The loop: collect groups, rank them, learn from the ranking; everything else is a callback."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from typing_extensions import Unpack

from dgpo.algorithms.base import Algorithm, BaseAlgorithm
from dgpo.distributed.processes import current_processes
from dgpo.distributed.signals import unharmed
from dgpo.errors import UserError
from dgpo.evaluation import Report
from dgpo.interrupts import Terminated, all_or_nothing
from dgpo.models.counting import Counter
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import RollingWeights
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.models.weights.restoring import restore_now
from dgpo.prompts import Prompt, PromptSampler
from dgpo.recipe import Recipe
from dgpo.recipe.places import placed
from dgpo.rewards import RewardSet
from dgpo.run.lock import RunLock
from dgpo.run.loggers.composite import make_loggers
from dgpo.run.tracking import plain, refuse_existing_run
from dgpo.training.agreement import join
from dgpo.training.arguments import (
    Given,
    Options,
    full_recipe,
    going_on,
    recipe_of_run,
    refuse_unknown,
)
from dgpo.training.batch import Batch
from dgpo.training.callbacks import Callbacks, make_callbacks
from dgpo.training.checkpoints import RunCheckpoints
from dgpo.training.collector import Collected
from dgpo.training.data import load_data
from dgpo.training.held_out import HeldOut
from dgpo.training.routine import Outputs, Tools, nothing_to_train, routine
from dgpo.training.run_guards import save_batch
from dgpo.training.setup import (
    check_model,
    encode_prompts,
    load_model,
    make_collector,
    make_policy,
    restored_state,
    try_rewards,
)
from dgpo.training.updater import NonFinite, Updater


class Trainer:
    """Post-trains a diffusion or flow model with a reward.

    Args:
        model: a diffusers pipeline, which is trained where it is, in its own precision; or what a
            recipe's ``model`` may be, which is put on the GPU if there is one. None for the
            recipe's.
        reward_funcs: functions ``(images, prompts, **metadata columns) -> list[float]`` or names,
            one or several, or ``{name: weight}``; None for the recipe's.
        train_dataset: prompts: texts, rows with ``prompt`` and metadata, a ``datasets.Dataset``, a
            file, or a set's name; None for the recipe's.
        eval_dataset: held-out prompts, likewise.
        algorithm: e.g. ``DGPO(beta=100)``; None for the recipe's.
        recipe: every other setting: a :class:`Recipe`, its name or file, or nested dicts.
        resume: go on from the last whole checkpoint: True in the recipe's run folder, ``"last"`` in
            the folder beside it that was written to last, a path in exactly that run folder. A run
            that was stopped before its first checkpoint begins again. A pipeline given as
            ``model`` must be the untrained one.
        callbacks: :class:`dgpo.Callback` objects, classes or names, beside ``run.callbacks``.
        report_to: what other trainers call ``run.loggers``: a name, several, or ``"none"``.

    Raises:
        UserError: anything that would fail later, before compute is spent.
    """

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        algorithm: BaseAlgorithm | None = None,
        recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> None:
        refuse_unknown(options)
        resume, report_to = options.get("resume", False), options.get("report_to")
        given = Given(model, reward_funcs, train_dataset, eval_dataset, algorithm, report_to)
        said = full_recipe(going_on(recipe, resume), given)
        self.recipe = recipe = placed(said)
        self.processes = processes = current_processes()
        self.callbacks = make_callbacks(options.get("callbacks", ()), "callbacks")
        self.callbacks += make_callbacks(recipe.run.callbacks, "run.callbacks")
        if processes.main:
            make_loggers(recipe.run.loggers)  # a missing package is told before a model is loaded
            if not resume:
                refuse_existing_run(self.folder)
        self._lock = RunLock(self.folder, processes.main)
        weakref.finalize(self, self._lock.release)
        try:
            self._lock.take()
            self._build(said, given, bool(resume))
        except BaseException:
            self._lock.release()
            raise

    def _build(self, said: Recipe, given: Given, resume: bool) -> None:
        """Load and check everything, what costs least first."""
        recipe, processes = self.recipe, self.processes
        self._checkpoints = RunCheckpoints(recipe, resume, processes)
        self.data = data = load_data(recipe, given)
        self.sampler = PromptSampler(data.prompts, recipe.groups_per_iteration, recipe.seed)
        join(said, processes, data.rewards, data.fingerprints)
        self._checkpoints.compare(data.fingerprints)
        loaded = load_model(recipe, given.model, self._checkpoints, processes, data.texts)
        self.scheduler = make_scheduler(recipe.rollout.scheduler, loaded.pipe.scheduler)
        """The deterministic sampler: of evaluations, and of rollouts without noise."""
        check_model(recipe, loaded, data, self.scheduler)
        self.policy = make_policy(recipe, loaded)
        self.updater = Updater(self.policy, recipe, processes)
        self._collect = make_collector(
            recipe, data, self.sampler, self.policy, self.scheduler, processes
        )
        self._held_out = HeldOut(recipe, self.policy, self.scheduler, data, processes)
        encode_prompts(recipe, loaded, data, self.sampler, self._held_out, processes)
        self.counter = Counter(loaded.denoisers.values())
        self.state = restored_state(self._checkpoints, self.updater, self._collect)

    @classmethod
    def from_run(cls, folder: str | Path, overrides: Sequence[str] = (), **given: Any) -> Trainer:
        """A trainer that goes on with the run in a folder.

        Args:
            folder: the run folder.
            overrides: settings to change, such as ``["train.iterations=200"]``.
            given: arguments of the trainer that no recipe can hold, such as a pipeline, a function
                of a notebook, or callbacks.

        Raises:
            UserError: there is no run, or as :class:`Trainer`.
        """
        return cls(recipe=recipe_of_run(folder, overrides), resume=folder, **given)

    def train(self) -> Report | None:
        """Run to the recipe's end; returns the last evaluation's report, if there was one.

        Ctrl-C saves a checkpoint and leaves with ``KeyboardInterrupt``; another ``train()``, or
        ``resume=True`` in another process, goes on from it. SIGTERM does so too, and ends the
        process with code 0. After the end it trains nothing, and says how to go on.

        Raises:
            UserError: a reward's answer is unusable (tried before the run folder is made), the run
                diverged, the disk is full, a callback raised, or an update was stopped between its
                optimiser steps.
        """
        self.updater.refuse_half_an_update()
        if self.state.phase == "ended":
            if self.processes.main:
                print(nothing_to_train(self.state))
            return self.last_report
        # a script may have switched gradients off before
        with (
            unharmed(self.processes, self.folder),
            self._lock,
            torch.inference_mode(False),
        ):
            try_rewards(self.recipe, self.data, self._held_out)
            with self._opened() as hooks:
                try:
                    hooks("on_train_begin")
                    while not hooks.control.should_stop:
                        hooks("on_iteration_begin")
                        began = monotonic()
                        collected = self._collected(hooks)
                        row = self._update(collected, began, hooks)
                        hooks("on_iteration_end", row=row)
                    hooks("on_train_end")
                    self.state.phase = "ended"
                except (KeyboardInterrupt, Terminated):
                    with all_or_nothing():  # whoever stops a run may do so twice
                        restore_now()
                        hooks("on_interrupt")
                    raise
                finally:
                    self.rewards.close()
        return self.last_report

    def evaluate(self, weights: RollingWeights = "slow") -> Report:
        """Score the held-out prompts with the slow average of the weights (or others).

        Raises:
            UserError: there are no held-out prompts, or no such weights.
        """
        self._refuse_no_old(f"evaluate({weights!r})", weights)
        return self._held_out.score(weights)

    def save_model(self, directory: str | Path, weights: RollingWeights = "slow") -> None:
        """Write weights as diffusers reads them; of several processes, all of which call this, the
        main one writes.

        Args:
            directory: a folder.
            weights: the slow average, which is evaluated; the ``policy`` as it was trained last;
                or the algorithm's ``old`` policy.

        Raises:
            UserError: there are no such weights.
        """
        self._refuse_no_old(f"save_model(weights={weights!r})", weights)
        self.policy.save(directory, weights, writes=self.processes.main)

    @property
    def algorithm(self) -> BaseAlgorithm:
        """The recipe's algorithm."""
        return self.recipe.algorithm

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self.state.iteration

    @property
    def seconds(self) -> float:
        """Training time spent; evaluation does not count."""
        return self.state.seconds

    @property
    def last_report(self) -> Report | None:
        """The last evaluation's report, if there was one."""
        return self.state.last_report

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.run.dir)

    @property
    def model(self) -> PipelineModel:
        """The pipeline that is trained."""
        return self.policy.model

    @property
    def rewards(self) -> RewardSet:
        """What is learned."""
        return self.data.rewards

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The training rows."""
        return self.data.prompts

    @property
    def eval_prompts(self) -> list[Prompt]:
        """The held-out rows."""
        return self.data.eval_prompts

    def _collected(self, hooks: Callbacks) -> Collected:
        """The pictures of the next iteration, with their rewards and advantages."""
        self.counter.begin()
        collected = self._collect(self.state.iteration)
        if collected.rewards is not None:
            hooks(
                "on_rollout",
                images=collected.images,
                prompts=collected.prompts,
                rewards=collected.rewards,
                advantages=collected.advantages,
            )
        return collected

    def _update(self, collected: Collected, began: float, hooks: Callbacks) -> dict[str, Any]:
        """Learn from a batch; returns the iteration's row, which is written down by then."""
        state, collected_at = self.state, monotonic()
        # an iteration is counted, timed and written down as one: a signal waits until it is
        with all_or_nothing() as hear:
            state.phase = "updating"
            figures: dict[str, float] = {"loss": 0.0}
            if collected.batch is not None:
                figures = self._learn(collected.batch, hear)
            else:
                self.updater.end_iteration(state.iteration)
            ended = monotonic()
            state.iteration += 1
            state.seconds += ended - began
            counted = self.counter.end(self.recipe.images_sampled, self.processes)
            state.counted = {name: state.counted[name] + n for name, n in counted.items()}
            row = plain(
                {
                    "iteration": state.iteration,
                    **collected.figures,
                    **figures,
                    **state.counted,
                    "seconds": state.seconds,
                    "seconds_iteration": ended - began,
                    "seconds_rollout": collected.seconds["rollout"],
                    "seconds_reward": collected.seconds["reward"],
                    "seconds_train": ended - collected_at,
                }
            )
            hooks("on_log", row=row)
            state.phase = "between"
        return row

    def _learn(self, batch: Batch, hear: Callable[[], None]) -> dict[str, float]:
        def pause() -> None:
            hear()
            self.processes.stop_if_asked("the next micro-batch")

        iteration = self.state.iteration
        try:
            return self.updater.update(batch, iteration, pause)
        except (KeyboardInterrupt, Terminated):
            # what the update has not changed, or has put back, is the state of the iteration before
            self.state.phase = "between" if self.updater.at_rest else "updating"
            raise
        except NonFinite as error:
            prompts, rank = self.sampler.at(iteration), self.processes.rank
            folder = self.folder / f"process-{rank}" if rank else self.folder
            file = save_batch(folder, batch, prompts, iteration + 1, str(error))
            # all have written before the first of them ends the others
            self.processes.all_gather_object(None, "the batch that is not finite to be saved")
            raise UserError(f"{error}. The batch is in {file}") from error

    @contextmanager
    def _opened(self) -> Iterator[Callbacks]:
        """The run folder, the progress bar and the callbacks of one ``train()``."""
        state = self.state
        after = -1 if state.phase == "again" else state.iteration
        # a first attempt that was stopped here may have made the run folder already, or not
        tried = state.phase == "tried" and not (self.folder / "recipe.yaml").exists()
        new = tried or state.phase == "new"
        state.phase = "tried" if state.phase == "new" else state.phase
        outputs = Outputs(self.recipe, None if new else after, self.processes.main)
        state.phase = "between"
        state.news = [*outputs.lost, *self._checkpoints.news(), *state.news]
        tools = Tools(
            self._held_out,
            self._checkpoints,
            self.updater,
            self._collect,
            self.rewards.names,
            self.processes,
        )
        with outputs, self.counter:
            yield routine(self.callbacks, state, outputs, tools)

    def _refuse_no_old(self, what: str, weights: RollingWeights) -> None:
        if weights == "old" and not isinstance(self.algorithm, Algorithm):
            raise UserError(
                f"{what}: {self.algorithm.name} keeps no old policy; use 'slow' or 'policy'"
            )
