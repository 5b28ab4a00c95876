"""What the trainer does at its own hooks: limits, records, guards, evaluation, checkpoints, grids.

:func:`routine` is the ordered list of all that happens beside collecting and updating.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dgpo.disk import resume_command
from dgpo.distributed.processes import Processes
from dgpo.evaluation import Report
from dgpo.recipe import Recipe
from dgpo.rewards import RewardFailure
from dgpo.run.manifest import record_start
from dgpo.run.progress import Progress, clock
from dgpo.run.tracking import Tracker, evaluation_row
from dgpo.training.callbacks import Callback, Callbacks, Control, OwnCallback
from dgpo.training.checkpoints import RunCheckpoints
from dgpo.training.collector import Collector
from dgpo.training.held_out import HeldOut
from dgpo.training.offline import RankedCollector
from dgpo.training.run_guards import Guards, foreseen, young_average
from dgpo.training.state import TrainerState
from dgpo.training.updater import Updater


@dataclass(frozen=True)
class Tools:
    """What the trainer's own callbacks work with.

    Args:
        held_out: scores and draws the prompts that are not trained on.
        checkpoints: the checkpoints of the run.
        updater: holds weights and optimiser.
        collector: may hold pictures that a checkpoint has to keep.
        rewards: the names of the rewards that are trained.
        processes: the processes of the run.
    """

    held_out: HeldOut
    checkpoints: RunCheckpoints
    updater: Updater
    collector: Collector | RankedCollector
    rewards: Sequence[str]
    processes: Processes


class Outputs:
    """The run folder and the progress bar, which the main process alone has.

    Args:
        recipe: the settings of the run.
        resume_after: see :class:`Tracker`.
        main: whether this is the main process; in the others nothing is written or shown.
    """

    def __init__(self, recipe: Recipe, resume_after: int | None, main: bool) -> None:
        self.progress: Progress | None = None
        self.tracker = Tracker(recipe, resume_after, self.say) if main else None
        if main:
            self.progress = Progress(recipe.train.iterations, recipe.train.max_minutes)
        self.lost = self.tracker.lost if self.tracker is not None else []
        """What a resumed run has no longer of what was measured before it."""

    def __enter__(self) -> Outputs:
        for part in (self.tracker, self.progress):
            if part is not None:
                part.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for part in (self.progress, self.tracker):
            if part is not None:
                part.__exit__(*error)

    def say(self, text: str) -> None:
        """Show a line that stays."""
        if self.progress is not None:
            self.progress.say(text)

    def stage(self, name: str) -> None:
        """Show what is being done now."""
        if self.progress is not None:
            self.progress.stage(name)

    def warn(self, iteration: int, texts: Sequence[str]) -> None:
        """Keep what the user should know in ``warnings.jsonl``, and say it."""
        for text in texts:
            if self.tracker is not None:
                self.tracker.warning(iteration, text)
            self.say(f"warning, iteration {iteration}: {text}")


def routine(
    users: Sequence[Callback], state: TrainerState, outputs: Outputs, tools: Tools
) -> Callbacks:
    """All callbacks of a run, in the order in which they are called.

    What is written down comes first, so that a user's callback finds it on the disk. What it may
    ask for (evaluation, checkpoint, stop) comes after it.

    Args:
        users: the callbacks that the user gave.
        state: the state of the run.
        outputs: the run folder and the progress bar.
        tools: what evaluation and checkpoints work with.
    """
    callbacks = Callbacks(state, tools.processes)
    callbacks.add(
        Limits(outputs),
        Records(outputs),
        RunGuards(outputs, tools),
        ProgressLine(outputs),
        *users,
        Evaluation(outputs, tools, callbacks),
        Checkpointing(outputs, tools, callbacks),
        Grids(outputs, tools),
        Card(outputs),
    )
    return callbacks


class Limits(OwnCallback):
    """Ends a run that has done its iterations or used its time; the main process's clock counts."""

    def __init__(self, outputs: Outputs) -> None:
        self._say = outputs.say

    def on_train_begin(self, state: TrainerState, control: Control, **what: Any) -> None:
        self._look(state, control)
        if control.should_stop and state.iteration:
            self._say(nothing_to_train(state))

    def on_iteration_end(self, state: TrainerState, control: Control, **what: Any) -> None:
        self._look(state, control)

    def _look(self, state: TrainerState, control: Control) -> None:
        if state.is_main_process and limit_of(state) is not None:
            control.should_stop = True


def limit_of(state: TrainerState) -> str | None:
    """The setting that ends the run now, or None."""
    train = state.recipe.train
    if state.iteration >= train.iterations:
        return f"train.iterations = {train.iterations}"
    if train.time_is_up(state.seconds):
        return f"train.max_minutes = {train.max_minutes:g}"
    return None


def nothing_to_train(state: TrainerState) -> str:
    """Why a run trains nothing, and how to go on with it."""
    limit, folder = limit_of(state), state.folder
    if limit is None:
        return f"nothing is trained: the run in {folder} was ended early; its result is in it"
    key = limit.partition(" ")[0]
    return (
        f"nothing is trained: the run in {folder} has done {state.iteration} iterations in "
        f"{clock(state.seconds)} ({limit}); to go on, raise it: Trainer.from_run('{folder}', "
        f"['{key}=MORE']).train(), or {resume_command(folder, f'{key}=MORE')}"
    )


class Records(OwnCallback):
    """Writes what is measured into the run folder, and keeps the history of the state."""

    def __init__(self, outputs: Outputs) -> None:
        self._say, self._tracker = outputs.say, outputs.tracker

    def on_train_begin(self, state: TrainerState, control: Control, **what: Any) -> None:
        if self._tracker is not None:
            record_start(state.folder, state.recipe.seed, state.iteration)
        for text in state.news:
            self._say(text)
        state.news.clear()

    def on_rollout(
        self,
        state: TrainerState,
        control: Control,
        *,
        prompts: Sequence[str],
        rewards: Mapping[str, Tensor],
        **what: Any,
    ) -> None:
        if self._tracker is not None:
            self._tracker.table(state.iteration + 1, {"prompt": prompts, **rewards})

    def on_log(
        self, state: TrainerState, control: Control, *, row: Mapping[str, Any], **what: Any
    ) -> None:
        state.log_history.append(dict(row))
        if self._tracker is not None:
            self._tracker.log(row)

    def on_evaluate(
        self, state: TrainerState, control: Control, *, report: Report, **what: Any
    ) -> None:
        state.last_report = report
        row = evaluation_row(state.iteration, state.seconds, report)
        state.log_history.append(row)
        if self._tracker is not None:
            self._tracker.evaluation(row)


class RunGuards(OwnCallback):
    """Warns of a run that goes wrong, and ends it if ``guards.stop`` says so."""

    def __init__(self, outputs: Outputs, tools: Tools) -> None:
        self._outputs, self._tools = outputs, tools
        self._guards: Guards | None = None

    def on_train_begin(self, state: TrainerState, control: Control, **what: Any) -> None:
        # made from the whole history: a run that goes on warns as one that was not stopped
        recipe = state.recipe
        groups, rewards = recipe.groups_per_iteration, self._tools.rewards
        self._guards = Guards(recipe.guards, groups, rewards, state.rows, state.evaluations)
        self._outputs.warn(0, foreseen(recipe))
        self._stop(control)

    def on_log(
        self, state: TrainerState, control: Control, *, row: Mapping[str, Any], **what: Any
    ) -> None:
        assert self._guards is not None
        self._outputs.warn(state.iteration, self._guards.iteration(row))
        self._stop(control)

    def on_evaluate(
        self, state: TrainerState, control: Control, *, report: Report, **what: Any
    ) -> None:
        assert self._guards is not None
        self._outputs.warn(state.iteration, self._guards.evaluation(state.evaluations[-1]))
        self._stop(control)

    def on_train_end(self, state: TrainerState, control: Control, **what: Any) -> None:
        recipe, steps = state.recipe, self._tools.updater.step
        if 0 < steps < recipe.optimizer_steps:  # fewer than were foreseen
            self._outputs.warn(state.iteration, young_average(recipe, steps))

    def _stop(self, control: Control) -> None:
        assert self._guards is not None
        if (reason := self._guards.reason_to_stop) is not None:
            control.should_stop, control.deliver = True, "best"
            control.reason = f"{reason} (guards.stop)"


class ProgressLine(OwnCallback):
    """Shows where the run stands."""

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs

    def on_iteration_begin(self, state: TrainerState, control: Control, **what: Any) -> None:
        self._outputs.stage("rollout")

    def on_rollout(self, state: TrainerState, control: Control, **what: Any) -> None:
        self._outputs.stage("training")

    def on_iteration_end(
        self, state: TrainerState, control: Control, *, row: Mapping[str, Any], **what: Any
    ) -> None:
        if self._outputs.progress is None:
            return
        recipe, reward = state.recipe, row["reward_mean"]
        self._outputs.progress.iteration(
            state.iteration,
            reward=math.nan if reward is None else reward,
            spread=1 - row["groups_dropped"] / recipe.groups_per_iteration,
            clipped=row.get("clipped", 0.0),
            samples_per_second=recipe.images_per_iteration / row["seconds_iteration"],
            trained_seconds=state.seconds,
        )


class Evaluation(OwnCallback):
    """Scores the held-out prompts when they are due or asked for, and at the end."""

    def __init__(self, outputs: Outputs, tools: Tools, hooks: Callbacks) -> None:
        self._outputs, self._held_out, self._hooks = outputs, tools.held_out, hooks

    def on_train_begin(self, state: TrainerState, control: Control, **what: Any) -> None:
        self._hooks.agree()
        due = state.recipe.eval.at_start if not state.iteration else self._due(state, control)
        if due:
            self._evaluate(state)

    def on_iteration_end(self, state: TrainerState, control: Control, **what: Any) -> None:
        self._hooks.agree()
        if self._due(state, control):
            self._evaluate(state)

    def on_train_end(self, state: TrainerState, control: Control, **what: Any) -> None:
        self._evaluate(state)

    def _due(self, state: TrainerState, control: Control) -> bool:
        asked, control.should_evaluate = control.should_evaluate, False
        # the end evaluates too
        return not control.should_stop and (asked or state.recipe.eval.due(state.iteration))

    def _evaluate(self, state: TrainerState) -> None:
        """Score the prompts, unless this was done before a stop. Collective."""
        done = {row["iteration"] for row in state.evaluations}
        if not self._held_out.prompts or state.iteration in done:
            return
        self._outputs.stage("evaluating")
        try:
            report = self._held_out.score("slow")
        except RewardFailure as failure:
            if not failure.skips:
                raise
            self._outputs.say(f"iteration {state.iteration}: held-out not scored: {failure}")
            return
        self._hooks("on_evaluate", report=report)
        self._hooks.agree()
        low, high = report.ci95
        score = f"{next(iter(report.rewards))} {report.overall:.3f} [{low:.3f}, {high:.3f}]"
        lost = f"; {report.lost} pictures are lost" if report.lost else ""
        self._outputs.say(f"iteration {state.iteration}: held-out {score}{lost}")


class Checkpointing(OwnCallback):
    """Saves the run when it is due, asked for, best so far, interrupted, or at its end."""

    def __init__(self, outputs: Outputs, tools: Tools, hooks: Callbacks) -> None:
        self._outputs, self._tools, self._hooks = outputs, tools, hooks

    def on_train_begin(self, state: TrainerState, control: Control, **what: Any) -> None:
        if state.iteration:  # what a stop has left undone
            self.on_iteration_end(state, control)

    def on_iteration_end(self, state: TrainerState, control: Control, **what: Any) -> None:
        asked, control.should_save = control.should_save, False
        due = asked or state.recipe.checkpoint.due(state.iteration, state.is_best)
        if due and not control.should_stop:  # the end saves too
            self._save(state)

    def on_train_end(self, state: TrainerState, control: Control, **what: Any) -> None:
        self._save(state, at_end=True)
        if control.deliver == "best":
            # from here on the weights are no longer the last iteration's: nothing may save them
            # under its name
            state.phase = "ended"
            state.delivered = best = self._tools.checkpoints.take_best(self._tools.updater)
            found = "there is no score"
            if best is not None:
                found = f"the best weights are of iteration {best}"
            self._outputs.say(f"stopped early, for {control.reason}; {found}")
        elif control.reason is not None:
            self._outputs.say(f"stopped early, for {control.reason}")

    def on_interrupt(self, state: TrainerState, control: Control, **what: Any) -> None:
        folder, standing = state.folder, self._tools.checkpoints.standing
        if state.phase == "updating":
            what_is_there = f"stopped in the middle of an update; {standing}"
        elif state.phase == "ended" or self._save(state):
            what_is_there = f"stopped; {state.iteration} iterations are saved"
        else:
            what_is_there = f"stopped after a step that was not finite; {standing}"
        again = f"{resume_command(folder)}, or Trainer(..., resume=True)"
        self._outputs.say(f"{what_is_there} in {folder}; to go on: {again}")

    def _save(self, state: TrainerState, at_end: bool = False) -> bool:
        """Save, unless the last step was left out for not being finite: its weights may be what
        ends the run, and must not take the place of better ones. Returns whether the checkpoint of
        the present iteration is there. Collective."""
        tools, updater = self._tools, self._tools.updater
        if updater.nonfinite and not at_end:
            state.not_saved.add(state.iteration)
            return False
        self._outputs.stage("saving")
        updater.refuse_broken_weights(state.iteration)
        state.not_saved.discard(state.iteration)
        early = tools.collector.pending(state.iteration)
        tools.checkpoints.save(updater, state.to_json(), state.score, early)
        self._hooks("on_save")
        return True


class Grids(OwnCallback):
    """Draws the sample prompts before, during and after training."""

    def __init__(self, outputs: Outputs, tools: Tools) -> None:
        self._tracker, self._held_out = outputs.tracker, tools.held_out
        self._before: list[Any] | None = None

    def on_train_begin(self, state: TrainerState, control: Control, **what: Any) -> None:
        if state.iteration:
            self.on_iteration_end(state, control)
        else:
            self._before = self._draw("before")

    def on_iteration_end(self, state: TrainerState, control: Control, **what: Any) -> None:
        if state.recipe.grid_due(state.iteration) and not control.should_stop:
            self._draw(f"{state.iteration:06d}")

    def on_train_end(self, state: TrainerState, control: Control, **what: Any) -> None:
        after = self._draw("after")
        if after is None:
            return
        before = self._before or self._held_out.pictures(base=True)
        if self._tracker is not None:
            self._tracker.compare(before, after, self._held_out.captions)

    def _draw(self, name: str) -> list[Any] | None:
        """Draw ``samples/NAME.png``; None if the recipe wants none. Collective if sharded."""
        if not self._held_out.shown:
            return None
        images = self._held_out.pictures()
        if self._tracker is not None:
            self._tracker.grid(name, images, self._held_out.captions)
        return images


class Card(OwnCallback):
    """Writes the curve and the model card."""

    def __init__(self, outputs: Outputs) -> None:
        self._say, self._tracker = outputs.say, outputs.tracker

    def on_train_end(self, state: TrainerState, control: Control, **what: Any) -> None:
        self._write(state.delivered)
        took = clock(state.seconds)
        self._say(f"{state.iteration} iterations in {took}; results in {state.folder}")

    def on_interrupt(self, state: TrainerState, control: Control, **what: Any) -> None:
        self._write(state.delivered)

    def _write(self, delivered: int | None) -> None:
        if self._tracker is not None:
            self._tracker.summarize(delivered)
