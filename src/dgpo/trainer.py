"""The loop: collect groups, rank them, learn from the ranking; evaluate, save, go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from dgpo.algorithms.base import Algorithm, BaseAlgorithm
from dgpo.disk import says_disk_full
from dgpo.distributed.processes import current_processes
from dgpo.distributed.signals import deferred
from dgpo.errors import UserError
from dgpo.evaluation import Report
from dgpo.interrupts import Terminated, all_or_nothing, terminable
from dgpo.models.counting import COUNTED, Counter
from dgpo.models.policy import RollingWeights
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.models.weights.restoring import restore_now
from dgpo.prompts import PromptSampler
from dgpo.recipe import Recipe
from dgpo.run.manifest import record_start
from dgpo.run.null_outputs import outputs
from dgpo.run.progress import clock
from dgpo.run.tracking import refuse_existing_run
from dgpo.training.agreement import join
from dgpo.training.arguments import full_recipe
from dgpo.training.batch import Batch
from dgpo.training.checkpoints import RunCheckpoints
from dgpo.training.held_out import HeldOut
from dgpo.training.journal import Journal
from dgpo.training.run_guards import save_batch
from dgpo.training.setup import (
    check_model,
    load_data,
    load_model,
    make_collector,
    make_policy,
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
        resume: go on from the last whole checkpoint in the recipe's run folder; a run that was
            stopped before its first begins again. A pipeline given as ``model`` must be the
            untrained one.

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
        resume: bool = False,
    ) -> None:
        self.recipe = full_recipe(
            recipe,
            model=model,
            algorithm=algorithm,
            reward_funcs=reward_funcs,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )
        self.algorithm = self.recipe.algorithm
        self.folder = Path(self.recipe.run.dir)
        self.processes = current_processes()
        self._checkpoints = RunCheckpoints(self.recipe, resume, self.processes)
        if not resume and self.processes.main:
            refuse_existing_run(self.folder)
        data = load_data(self.recipe, reward_funcs, train_dataset, eval_dataset)
        self._data, self.rewards, self.metrics = data, data.rewards, data.metrics
        self.prompts, self.eval_prompts = data.prompts, data.eval_prompts
        self.rewards.run_in(self.folder)
        per_iteration = self.recipe.groups_per_iteration
        self.sampler = PromptSampler(self.prompts, per_iteration, self.recipe.seed)
        join(self.recipe, self.processes, self.rewards, self.prompts)

        self.model = load_model(self.recipe, model, self._checkpoints, self.processes, data.texts)
        self.scheduler = make_scheduler(self.recipe.rollout.scheduler, self.model.pipe.scheduler)
        """The deterministic sampler: of evaluations, and of rollouts without noise."""
        check_model(self.recipe, self.model, self.prompts[:2], self.scheduler)
        self.model.check_pictures(data.texts)
        self.policy = make_policy(self.recipe, self.model, data.texts)
        self.updater = Updater(self.policy, self.algorithm, self.recipe, self.processes)
        self._collect = make_collector(
            self.recipe, data, self.sampler, self.policy, self.scheduler, self.processes
        )
        self.counter = Counter(self.model.denoisers.values())
        self._held_out = HeldOut(
            self.recipe,
            self.policy,
            self.scheduler,
            self.metrics,
            self.eval_prompts,
            self.prompts,
            self.processes,
        )

        self.iteration = 0
        """Iterations done."""
        self.seconds = 0.0
        """Training time spent: rollouts, rewards and updates; evaluation does not count."""
        self.last_report: Report | None = None
        self._before: list | None = None
        self._goes_on, self._began = resume, False
        self._between_updates = True
        self._not_saved: set[int] = set()
        """Iterations whose weights were not saved: their scores are no bar for others."""
        self._stopped_early = False
        """A guard has ended the run, and the best weights have taken the place of the last."""
        counters, ahead = self._checkpoints.restore(self.policy, self.updater)
        if counters:
            self.iteration, self.seconds = counters["iteration"], counters["seconds"]
            self.counter.totals = {name: counters.get(name, 0) for name in COUNTED}
            self._not_saved = set(counters.get("not_saved", ()))
        self._left_aside = self._collect.restore(ahead)

    def train(self) -> Report | None:
        """Run to the recipe's end; returns the last evaluation's report, if there was one.

        Ctrl-C saves a checkpoint and leaves with ``KeyboardInterrupt``; another ``train()``, or
        ``resume=True`` in another process, goes on from it. SIGTERM does so too, and ends the
        process with code 0.

        Raises:
            UserError: a reward's answer is unusable (tried before the run folder is made), the run
                diverged, the disk is full, or an update was stopped between its optimiser steps.
        """
        if not self.updater.at_rest:
            raise UserError(
                "train(): the update of this run was cut off between its optimiser steps, and its "
                "weights belong to no iteration: go on from the last checkpoint, by another "
                "Trainer(..., resume=True)"
            )
        with (
            self.processes.ending_together(),
            terminable(),
            deferred(self.processes),
            says_disk_full(self.folder),
        ):
            return self._train()

    def _train(self) -> Report | None:
        try_rewards(self.recipe, self._data, self._held_out)
        done = -1 if self._checkpoints.begins_again else self.iteration
        # a first attempt that was stopped here may have made the run folder already
        self._goes_on |= self._began and (self.folder / "recipe.yaml").exists()
        self._began = True
        resume_after = done if self._goes_on else None
        tracker, progress = outputs(self.recipe, resume_after, self.processes)
        self._goes_on = True
        self._tracker, self._progress = tracker, progress
        if self.processes.main:
            record_start(self.folder, self.recipe.seed, self.iteration)
        self._journal = Journal(
            self.recipe,
            tracker,
            progress,
            self.rewards.names,
            self._held_out,
            self.processes,
            self._not_saved,
        )
        with tracker, progress, self.counter:
            try:
                self._start()
                while not self._finished:
                    self._iterate()
                    self._when_due()
                self._end()
            except (KeyboardInterrupt, Terminated):
                with all_or_nothing():  # whoever stops a run may do so twice
                    restore_now()
                    self._stop()
                raise
            finally:
                self.rewards.close()
        return self.last_report

    def evaluate(self, weights: RollingWeights = "slow") -> Report:
        """Score the held-out prompts with the slow average of the weights (or others).

        Raises:
            UserError: there are no held-out prompts, or no such weights.
        """
        if weights == "old" and not isinstance(self.algorithm, Algorithm):
            raise UserError(
                f"evaluate('old'): {self.algorithm.name} keeps no old policy; use 'slow' or "
                "'policy'"
            )
        return self._held_out.score(weights)

    def save_model(self, directory: str | Path) -> None:
        """Write the slow average of the trained weights as diffusers reads them; of several
        processes, all of which call this, the main one writes."""
        self.policy.save(directory, "slow", writes=self.processes.main)

    def _iterate(self) -> None:
        """One iteration: collect, update, log."""
        recipe, began = self.recipe, monotonic()
        self._progress.stage("rollout")
        self.counter.begin()
        collected = self._collect(self.iteration)
        self._progress.stage("training")
        collected_at = monotonic()
        with all_or_nothing() as hear:
            self._between_updates = False
            figures: dict[str, float] = {"loss": 0.0}
            if collected.batch is not None:
                figures = self._update(collected.batch, hear)
            else:
                self.updater.end_iteration(self.iteration)
            ended = monotonic()
            self.iteration += 1
            self.seconds += ended - began
            row = {
                "iteration": self.iteration,
                **collected.figures,
                **figures,
                **self.counter.end(recipe.images_sampled, self.processes),
                "seconds": self.seconds,
                "seconds_iteration": ended - began,
                "seconds_rollout": collected.seconds["rollout"],
                "seconds_reward": collected.seconds["reward"],
                "seconds_train": ended - collected_at,
            }
            self._journal.iteration(row)
            self._between_updates = True
        self._progress.iteration(
            self.iteration,
            reward=row["reward_mean"],
            spread=1 - row["groups_dropped"] / recipe.groups_per_iteration,
            clipped=row.get("clipped", 0.0),
            samples_per_second=recipe.images_per_iteration / row["seconds_iteration"],
            trained_seconds=self.seconds,
        )

    def _update(self, batch: Batch, hear: Callable[[], None]) -> dict[str, float]:
        def pause() -> None:
            hear()
            self.processes.stop_if_asked("the next micro-batch")

        try:
            return self.updater.update(batch, self.iteration, pause)
        except (KeyboardInterrupt, Terminated):
            # what the update has not changed, or has put back, is the state of the iteration before
            self._between_updates = self.updater.at_rest
            raise
        except NonFinite as error:
            prompts, rank = self.sampler.at(self.iteration), self.processes.rank
            folder = self.folder / f"process-{rank}" if rank else self.folder
            file = save_batch(folder, batch, prompts, self.iteration + 1, str(error))
            self.processes.all_gather_object(None, "the batch that is not finite to be saved")
            raise UserError(f"{error}. The batch is in {file}") from error

    @property
    def _finished(self) -> bool:
        limit = self.recipe.train.max_minutes
        late = limit is not None and self.seconds >= 60 * limit
        done = late or self.iteration >= self.recipe.train.iterations
        done = done or self._journal.reason_to_stop is not None
        return self.processes.broadcast_object(lambda: done, "whether the run goes on")

    def _start(self) -> None:
        """Before the first update: the base model's pictures and score."""
        news = [*self.policy.news, *self._tracker.lost, *self._checkpoints.news()]
        for text in [*news, *self._left_aside]:
            self._progress.say(text)
        self._left_aside = []
        if self.iteration:
            self._when_due()  # what a stop has left undone
            return
        self._before = self._journal.draw("before")
        if self.recipe.eval.at_start:
            self._evaluate()

    def _when_due(self) -> None:
        """Evaluate, draw and save after an iteration, as often as the recipe says."""
        if self._finished:
            return  # the end does all three
        recipe, done = self.recipe, self.iteration
        if recipe.eval.due(done):
            self._evaluate()
        every = recipe.eval.every if recipe.samples.every is None else recipe.samples.every
        if every and done % every == 0:
            self._journal.draw(f"{done:06d}")
        due = bool(recipe.checkpoint.every) and done % recipe.checkpoint.every == 0
        due = due or (recipe.checkpoint.keep_best > 0 and self._journal.is_best(done))
        if self.processes.broadcast_object(lambda: due, "whether a checkpoint is due"):
            self._save_checkpoint()

    def _end(self) -> None:
        if self._stopped_early:
            return self._progress.say(f"the run was stopped early; results in {self.folder}")
        steps, every = self.updater.step, self.recipe.ema.every
        if 0 < steps < every:
            self._journal.warn(
                self.iteration,
                f"ema.every = {every}: after {steps} optimiser steps the average, which is "
                "evaluated and saved, has not moved; lower ema.every or train for longer",
            )
        self._evaluate()
        self._save_checkpoint(at_end=True)
        reason = self.processes.broadcast_object(lambda: self._journal.reason_to_stop, "the end")
        delivered = None if reason is None else self._stop_early(reason)
        after = self._journal.draw("after")
        if after is not None:
            before = self._before or self._held_out.pictures(base=True)
            self._tracker.compare(before, after, self._held_out.captions)
        self._tracker.summarize(delivered)
        took = clock(self.seconds)
        self._progress.say(f"{self.iteration} iterations in {took}; results in {self.folder}")

    def _stop_early(self, reason: str) -> int | None:
        """A guard has ended the run: the weights of the best checkpoint are those that count. Its
        iteration, or None where no checkpoint has a score."""
        self._stopped_early = True
        best = self._checkpoints.take_best(self.policy, self.updater)
        what = "there is no score" if best is None else f"the best weights are of iteration {best}"
        self._progress.say(f"stopped early, for {reason} (guards.stop); {what}")
        return best

    def _stop(self) -> None:
        """After Ctrl-C or SIGTERM."""
        if not self._between_updates:
            what = f"stopped in the middle of an update; {self._checkpoints.standing}"
        elif self._save_checkpoint():
            what = f"stopped; {self.iteration} iterations are saved"
        else:
            what = f"stopped after a step that was not finite; {self._checkpoints.standing}"
        self._tracker.summarize()
        again = f"dgpo train {self.folder / 'recipe.yaml'} --resume, or Trainer(..., resume=True)"
        self._progress.say(f"{what} in {self.folder}; to go on: {again}")

    def _evaluate(self) -> None:
        if self.eval_prompts:
            report = self._journal.evaluate(self.iteration, self.seconds)
            self.last_report = report or self.last_report

    def _save_checkpoint(self, at_end: bool = False) -> bool:
        """Save, unless the last step was left out for not being finite: its weights may be what
        ends the run, and must not take the place of better ones. Returns whether the checkpoint of
        the present iteration is there.

        Args:
            at_end: nothing comes after it that could be saved.
        """
        if self._stopped_early:
            return True  # the last iteration's checkpoint keeps the last weights
        if self.updater.nonfinite and not at_end:
            self._not_saved.add(self.iteration)
            return False
        self._progress.stage("saving")
        self.updater.refuse_broken_weights(self.iteration)
        counters = {"iteration": self.iteration, "seconds": self.seconds, **self.counter.totals}
        self._not_saved.discard(self.iteration)
        counters |= {"not_saved": sorted(self._not_saved)}
        score = self._journal.score(self.iteration)
        ahead = self._collect.pending(self.iteration)
        self._checkpoints.save(self.policy, self.updater, counters, score, ahead)
        return True
