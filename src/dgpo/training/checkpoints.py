"""The checkpoints of one run: where they are, which one it goes on from, and which are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dgpo.disk import replace_folder, set_aside
from dgpo.distributed.processes import SINGLE, Processes
from dgpo.models.policy import Policy
from dgpo.models.weights.snapshots import base_fingerprints
from dgpo.recipe import Recipe
from dgpo.recipe.changes import changes_of_run, refuse_changes, told_changes
from dgpo.training.checkpoint_files import (
    Found,
    any_checkpoint,
    find_checkpoint,
    load_ahead,
    load_checkpoint,
    prune,
    refuse_other_base,
    save_checkpoint,
)
from dgpo.training.fingerprints import Fingerprint, compared
from dgpo.training.prefetched import NOTHING, Prefetched
from dgpo.training.updater import Updater


class RunCheckpoints:
    """Saves a run and finds what it goes on from.

    All processes call the same methods; the main one reads and writes.

    Args:
        recipe: the settings of the run.
        resume: whether to go on from the last whole checkpoint. A run that was stopped before its
            first was finished begins again.
        processes: the processes of the run. Collective.

    Raises:
        UserError: there is no run, none of its checkpoints is whole, or the recipe changes what
            gives its tensors their meaning.
    """

    def __init__(self, recipe: Recipe, resume: bool, processes: Processes = SINGLE) -> None:
        self._run = Path(recipe.run.dir)
        self._folder = self._run / "checkpoints"
        self._recipe, self._processes = recipe, processes
        self._model = "model" if recipe.lora is None else "lora"
        self._base: dict[str, str] = {}
        self._data: Mapping[str, Fingerprint] = {}
        self._news: list[str] = []
        self.start: Literal["new", "again", "between"] = "new"
        """How the run begins: in a new folder, again since it was stopped before its first
        checkpoint, or between two iterations of an earlier run."""
        if resume:
            never = processes.broadcast_object(self._was_never_saved, "whether it was ever saved")
            self.start = "again" if never else "between"
        self.found: Found | None = None
        """What the main process goes on from; None in a run that begins."""
        if self.start == "between" and processes.main:
            self.found = find_checkpoint(self._folder)
        if resume and processes.main:
            self._compare_recipes()

    def compare(self, data: Mapping[str, Fingerprint]) -> None:
        """Compare what is trained on with that of the checkpoint, and remember it for the next.

        Raises:
            UserError: see :func:`dgpo.training.fingerprints.compared`.
        """
        self._data = data
        if self.found is not None:
            # checkpoints of earlier versions hold none
            saved = self.found.manifest.get("data", {})
            self._news += compared(saved, data, self.found.folder)

    def look_at(self, components: Mapping[str, Any]) -> None:
        """Remember the weights of a pipeline before anything is trained or added.

        Collective.

        Raises:
            UserError: the run that goes on began with others, or another process has others.
        """
        self._base = base_fingerprints(components)
        named = {f"model (the weights of {name})": bits for name, bits in self._base.items()}
        self._processes.refuse_difference(named)
        if self.found is not None:
            refuse_other_base(self.found, self._base)

    def restore(self, updater: Updater) -> tuple[dict[str, Any], Prefetched]:
        """The counters of the checkpoint that the run goes on from, none if it begins; and what was
        sampled ahead."""
        if self.start != "between":
            return {}, NOTHING
        folder = None if self.found is None else self.found.folder
        state = load_checkpoint(folder, updater)
        return state, load_ahead(folder, state, self._processes)

    def news(self) -> list[str]:
        """What the run goes on from, and what was set aside for damage; said once.

        Damaged checkpoints are renamed: with their names they would count as the last ones, and
        those that are saved from now on would be deleted as older.
        """
        found, self.found = self.found, None
        told, self._news = self._news, []
        if found is None:
            again, self.start = self.start == "again", "new"
            why = f"no checkpoint was finished in {self._folder} before the run was stopped"
            return [f"begins again: {why}", *told] if again else []
        left = [
            f"left aside: {problem}; its folder is now {set_aside(place).name}"
            for place, problem in found.damaged.items()
        ]
        return [*left, f"goes on after iteration {found.iteration}: {found.folder}", *told]

    def save(
        self,
        updater: Updater,
        counters: Mapping[str, Any],
        score: float | None,
        ahead: Prefetched = NOTHING,
    ) -> None:
        """Write a checkpoint, delete those that need not be kept, and write the model."""
        keep = self._recipe.checkpoint
        saved = save_checkpoint(
            self._folder,
            updater,
            counters,
            score=score,
            base=self._base,
            data=self._data,
            ahead=ahead,
        )
        if self._processes.main:
            prune(self._folder, keep.keep_last, keep.keep_best, saved)
        self._save_model(updater.policy)

    def take_best(self, updater: Updater) -> int | None:
        """Put the best checkpoint back and write its model; its iteration, None without a score."""
        best: list[Found] = []

        def find() -> int | None:
            best.append(find_checkpoint(self._folder, best=True))
            return None if best[0].manifest["score"] is None else best[0].iteration

        iteration = self._processes.broadcast_object(find, "the best checkpoint")
        if iteration is None:
            return None
        folder = best[0].folder if best else None
        load_checkpoint(folder, updater)
        self._save_model(updater.policy)
        return iteration

    @property
    def standing(self) -> str:
        """What a run goes on from whose present weights were not saved."""
        if any_checkpoint(self._folder):
            return "the checkpoint before it stands"
        return "there is no checkpoint yet, and the run begins again"

    def _compare_recipes(self) -> None:
        """Refuse or tell what differs from the recipe of the run."""
        found = changes_of_run(self._recipe)
        if self.start == "between":
            refuse_changes(found, self._run)
        if found:
            self._news.append(f"settings that differ from those of before:\n{told_changes(found)}")

    def _was_never_saved(self) -> bool:
        """Return whether there is a run with neither a checkpoint nor the model that follows it."""
        saved = any_checkpoint(self._folder) or (self._run / self._model).exists()
        return (self._run / "recipe.yaml").exists() and not saved

    def _save_model(self, policy: Policy) -> None:
        if self._processes.main:
            replace_folder(self._run / self._model, lambda place: policy.save(place, "slow"))
        else:
            policy.save(self._run / self._model, "slow", writes=False)
