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
from dgpo.models.policy import Policy
from dgpo.models.snapshots import base_fingerprints
from dgpo.recipe import Recipe
from dgpo.updating import Updater


class RunCheckpoints:
    """Saves a run and finds what it goes on from.

    Args:
        recipe: of the run.
        resume: whether there must be a checkpoint to go on from.

    Raises:
        UserError: there is none that is whole.
    """

    def __init__(self, recipe: Recipe, resume: bool) -> None:
        self._run = Path(recipe.run.dir)
        self._folder = self._run / "checkpoints"
        self._recipe = recipe
        self._base: dict[str, str] = {}
        self.found: Found | None = find_checkpoint(self._folder) if resume else None
        """What the run goes on from; None for a run that begins."""

    def look_at(self, components: Mapping[str, Any]) -> None:
        """Remember the weights of a pipeline before anything is trained or added.

        Raises:
            UserError: the run that goes on began with others.
        """
        self._base = base_fingerprints(components)
        if self.found is not None:
            refuse_other_base(self.found, self._base)

    def restore(self, policy: Policy, updater: Updater) -> dict[str, Any]:
        """The counters of the checkpoint that the run goes on from; none if it begins."""
        return {} if self.found is None else load_checkpoint(self.found.folder, policy, updater)

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
        base, keep = self._base, self._recipe.checkpoint
        save_checkpoint(self._folder, policy, updater, counters, score=score, base=base)
        prune(self._folder, keep.keep_last, keep.keep_best)
        self._save_model(policy)

    def take_best(self, policy: Policy, updater: Updater) -> int | None:
        """Put the best checkpoint back and write its model; its iteration, None without a score."""
        best = find_checkpoint(self._folder, best=True)
        if best.manifest["score"] is None:
            return None
        load_checkpoint(best.folder, policy, updater)
        self._save_model(policy)
        return best.iteration

    def _save_model(self, policy: Policy) -> None:
        name = "model" if self._recipe.lora is None else "lora"
        replace_folder(self._run / name, lambda place: policy.save(place, "slow"))
