"""The checkpoints of one run: where they are, which one it goes on from, and which are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgpo.checkpoint import (
    Found,
    find_checkpoint,
    load_checkpoint,
    prune,
    refuse_other_base,
    save_checkpoint,
)
from dgpo.disk import replace_folder
from dgpo.distributed.processes import ALONE, Processes
from dgpo.models.policy import Policy
from dgpo.models.snapshots import base_fingerprints
from dgpo.recipe import Recipe
from dgpo.updating import Updater


class RunCheckpoints:
    """Saves a run and finds what it goes on from.

    Of several processes, all of which call the same methods, the main one reads and writes.

    Args:
        recipe: of the run.
        resume: whether there must be a checkpoint to go on from.
        processes: of the run.

    Raises:
        UserError: there is none that is whole.
    """

    def __init__(self, recipe: Recipe, resume: bool, processes: Processes = ALONE) -> None:
        self._run = Path(recipe.run.dir)
        self._folder = self._run / "checkpoints"
        self._recipe, self._processes, self._resume = recipe, processes, resume
        self._base: dict[str, str] = {}
        self.found: Found | None = None
        """What the main process goes on from; None in a run that begins."""
        if resume and processes.main:
            self.found = find_checkpoint(self._folder)

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

    def restore(self, policy: Policy, updater: Updater) -> dict[str, Any]:
        """The counters of the checkpoint that the run goes on from; none if it begins."""
        if not self._resume:
            return {}
        folder = None if self.found is None else self.found.folder
        return load_checkpoint(folder, policy, updater, self._processes)

    def news(self) -> list[str]:
        """What the run goes on from, and what was left aside for damage; said once."""
        found, self.found = self.found, None
        if found is None:
            return []
        left = [f"left aside: {problem}" for problem in found.damaged]
        return [*left, f"goes on after iteration {found.iteration}: {found.folder}"]

    def save(
        self,
        policy: Policy,
        updater: Updater,
        counters: Mapping[str, Any],
        score: float | None,
    ) -> None:
        """Write a checkpoint, delete those that need not be kept, and write the model."""
        keep = self._recipe.checkpoint
        save_checkpoint(
            self._folder,
            policy,
            updater,
            counters,
            score=score,
            base=self._base,
            processes=self._processes,
        )
        if self._processes.main:
            prune(self._folder, keep.keep_last, keep.keep_best)
        self._save_model(policy)

    def take_best(self, policy: Policy, updater: Updater) -> int | None:
        """Put the best checkpoint back and write its model; its iteration, None without a score."""
        best: list[Found] = []

        def find() -> int | None:
            best.append(find_checkpoint(self._folder, best=True))
            return None if best[0].manifest["score"] is None else best[0].iteration

        iteration = self._processes.from_main(find, "the best checkpoint")
        if iteration is None:
            return None
        folder = best[0].folder if best else None
        load_checkpoint(folder, policy, updater, self._processes)
        self._save_model(policy)
        return iteration

    def _save_model(self, policy: Policy) -> None:
        name = "model" if self._recipe.lora is None else "lora"
        if self._processes.main:
            replace_folder(self._run / name, lambda place: policy.save(place, "slow"))
        else:
            policy.save(self._run / name, "slow", writes=False)
