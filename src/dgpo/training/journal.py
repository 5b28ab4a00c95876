"""What a run writes down and says: metrics, warnings, scores and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dgpo.distributed.processes import Processes
from dgpo.evaluation import Report
from dgpo.recipe import Recipe
from dgpo.rewards import RewardFailure
from dgpo.run.progress import Progress
from dgpo.run.tracking import Tracker
from dgpo.training.held_out import HeldOut
from dgpo.training.run_guards import Guards


class Journal:
    """The run folder, the progress bar and the guards, which see the same figures.

    Args:
        recipe: of the run.
        tracker: the run folder.
        progress: the progress bar.
        rewards: the names of the rewards that are trained.
        held_out: the prompts that are scored and drawn.
        processes: of the run, all of which call the same methods.
        not_saved: iterations whose weights were not to be saved, however good their score.
    """

    def __init__(
        self,
        recipe: Recipe,
        tracker: Tracker,
        progress: Progress,
        rewards: Sequence[str],
        held_out: HeldOut,
        processes: Processes,
        not_saved: set[int],
    ) -> None:
        self._recipe, self._held_out, self._processes = recipe, held_out, processes
        self.tracker, self.progress = tracker, progress
        groups = recipe.groups_per_iteration
        self._guards = Guards(recipe.guards, groups, rewards, tracker.rows, tracker.evaluations)
        self.not_saved = not_saved

    @property
    def reason_to_stop(self) -> str | None:
        """Why a guard ends the run, if one does."""
        return self._guards.reason_to_stop

    def iteration(self, row: Mapping[str, Any]) -> None:
        """Write the figures of an iteration, and what the guards think of them."""
        self.tracker.log(row)
        self.warn(row["iteration"], *self._guards.iteration(row))

    def evaluate(self, iteration: int, seconds: float) -> Report | None:
        """Score the held-out prompts and write it down; None if a reward that may be passed over
        has failed, or this was done before a stop. Collective.

        Args:
            iteration: after which this is.
            seconds: training time spent by then.

        Raises:
            UserError: there are no held-out prompts.
            RewardFailure: a reward that may not be passed over has failed.
        """
        done = iteration in {row["iteration"] for row in self.tracker.evaluations}
        done = self._processes.broadcast_object(lambda: done, "whether to evaluate")
        if done:
            return None
        self.progress.stage("evaluating")
        try:
            report = self._held_out.score("slow")
        except RewardFailure as failure:
            if not failure.skips:
                raise
            self.progress.say(f"iteration {iteration}: held-out not scored: {failure}")
            return None
        self.tracker.evaluation(iteration, seconds, report)
        for row in self.tracker.evaluations[-1:]:
            self.warn(iteration, *self._guards.evaluation(row))
        low, high = report.ci95
        first = next(iter(report.rewards))
        score = f"{first} {report.overall:.3f} [{low:.3f}, {high:.3f}]"
        self.progress.say(f"iteration {iteration}: held-out {score}")
        return report

    def draw(self, name: str) -> list | None:
        """Draw the sample prompts into ``samples/NAME.png``; None if the recipe wants none."""
        if not self._recipe.samples.count:
            return None
        images = self._held_out.pictures()
        self.tracker.grid(name, images, self._held_out.captions)
        return images

    def score(self, iteration: int) -> float | None:
        """The held-out score after an iteration, if there was an evaluation."""
        return self._scores.get(iteration)

    def is_best(self, iteration: int) -> bool:
        """Whether there was an evaluation after an iteration, and none before was as good, of those
        whose weights may have been saved."""
        scores = {done: score for done, score in self._scores.items() if done not in self.not_saved}
        mine = scores.pop(iteration, None)
        return mine is not None and mine > max(scores.values(), default=float("-inf"))

    @property
    def _scores(self) -> dict[int, float]:
        """By iteration; an evaluation without a number has none."""
        rows = self.tracker.evaluations
        return {r["iteration"]: r["overall"] for r in rows if r["overall"] is not None}

    def warn(self, iteration: int, *texts: str) -> None:
        """Keep what the user should know in ``warnings.jsonl``, and say it."""
        for text in texts:
            self.tracker.warning(iteration, text)
            self.progress.say(f"warning, iteration {iteration}: {text}")
