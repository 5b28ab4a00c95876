"""What a run shows of itself: scores and pictures of prompts that it does not train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dgpo.distributed.processes import SINGLE, Processes
from dgpo.errors import UserError
from dgpo.evaluation import Report, Sampling, evaluate, sample_images
from dgpo.models.policy import Policy, RollingWeights
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.prompts import Prompt
from dgpo.recipe import Recipe
from dgpo.training.data import Data


class HeldOut:
    """Scores and pictures of the policy, sampled as the recipe's evaluation says.

    Args:
        recipe: ``eval``, ``samples`` and ``rollout`` are read.
        policy: whose weights are looked at.
        scheduler: the deterministic sampler, unless ``eval.scheduler`` names another.
        data: the held-out rows and what is measured on them; where nothing is held out, grids are
            drawn of the training rows.
        processes: the processes of the run. Scores are made by all of them, grids by the main one.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        scheduler: Any,
        data: Data,
        processes: Processes = SINGLE,
    ) -> None:
        self._recipe, self._policy, self._metrics = recipe, policy, data.metrics
        self._processes = processes
        self.prompts = data.eval_prompts
        """The held-out rows; may be empty."""
        if recipe.eval.scheduler is not None:
            scheduler = eval_sampler(recipe.eval.scheduler, policy.model.pipe.scheduler)
        how = recipe.eval_sampling
        self.sampling = Sampling(how.steps, how.guidance_scale, scheduler, how.batch)
        """How all pictures are sampled."""
        rows = self.prompts or data.prompts
        count = min(recipe.samples.count, len(rows))
        self.shown = [rows[i * len(rows) // count] for i in range(count)]
        """The prompts of the grids: evenly from the held-out rows, or from the training rows."""

    @property
    def captions(self) -> list[str]:
        """The texts of :attr:`shown`."""
        return [prompt.text for prompt in self.shown]

    def sample(self, prompts: Sequence[Prompt]) -> list:
        """One picture of each prompt by the weights that are in place."""
        return sample_images(self._policy.model, prompts, self.sampling)

    def score(self, weights: RollingWeights = "slow") -> Report:
        """Score the held-out prompts.

        Raises:
            UserError: there are none.
        """
        if not self.prompts:
            raise UserError("no held-out prompts: set prompts.eval, or give eval_dataset")
        name = self._recipe.prompts.eval or "eval_dataset"
        model = self._policy.model
        with self._policy.rolling(weights):
            rows, processes = self.prompts, self._processes
            return evaluate(model, rows, self._metrics, self.sampling, name, processes)[0]

    def pictures(self, base: bool = False) -> list:
        """The pictures of a grid by the slow average of the weights, or by the base model; none in
        a process that is not the main one, unless they all have to make them with it."""
        if not self._processes.main and not self._policy.sharded:
            return []
        place = self._policy.reference() if base else self._policy.rolling("slow")
        with place:
            return sample_images(self._policy.model, self.shown, self.sampling, self._recipe.seed)


def eval_sampler(name: str, base: Any) -> Any:
    """The sampler that ``eval.scheduler`` names.

    Raises:
        UserError: it does not fit the pipeline.
    """
    try:
        return make_scheduler(name, base)
    except UserError as error:
        raise UserError(str(error).replace("rollout.scheduler", "eval.scheduler")) from None
