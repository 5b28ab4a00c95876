"""What a run learns and measures, and on which prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dgpo.errors import UserError
from dgpo.evaluation import Metrics
from dgpo.prompts import Prompt, load_prompts, refuse_sizes
from dgpo.recipe import Recipe
from dgpo.rewards import RewardSet, load_rewards
from dgpo.training.arguments import Given
from dgpo.training.fingerprints import Fingerprint, of_file, of_rows
from dgpo.training.offline import ranked_prompts


@dataclass(frozen=True)
class Data:
    """What is learned and measured, and on which prompts."""

    rewards: RewardSet
    metrics: Metrics
    prompts: Sequence[Prompt]
    eval_prompts: list[Prompt]
    offline: bool
    """True if the prompts belong to groups that were ranked before the run."""
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    """The fingerprints of the rows and of the files of the user's own rewards, by the recipe's
    keys."""

    @property
    def texts(self) -> list[str]:
        """The texts of all rows, the held-out ones included."""
        return [prompt.text for prompt in (*self.prompts, *self.eval_prompts)]


def load_data(recipe: Recipe, given: Given) -> Data:
    """Load rewards, metrics and prompts, and let the first two refuse the third.

    Args:
        recipe: the settings of the run.
        given: rewards and prompts of the trainer's arguments, which go before the recipe's.

    Raises:
        UserError: something is missing or does not fit.
    """
    offline = recipe.data.preferences is not None
    if offline and given.train_dataset is not None:
        raise UserError("train_dataset: data.preferences brings its own prompts; give one")
    asked = recipe.rewards if given.reward_funcs is None else given.reward_funcs
    rewards = load_rewards(asked) if asked or not offline else RewardSet([])
    metrics = Metrics(recipe.eval.metrics or rewards)
    source, held_out = recipe.prompts.train, recipe.prompts.eval
    prompts: Sequence[Prompt] = (
        ranked_prompts(recipe)
        if offline
        else load_prompts(source if given.train_dataset is None else given.train_dataset)
    )
    held_out = held_out if given.eval_dataset is None else given.eval_dataset
    held_out_rows = [] if held_out is None else load_prompts(held_out)
    eval_prompts = held_out_rows[: recipe.eval.limit]
    refuse_sizes([*([] if offline else prompts), *eval_prompts], recipe.rollout.call)
    if eval_prompts and not metrics.names:
        raise UserError("eval.metrics is missing: what shall be measured on prompts.eval?")
    if recipe.memory.offload_rewards:
        rewards.offload()
        metrics.offload()
    if not offline:
        rewards.check(prompts)
    metrics.check(eval_prompts)
    rewards.run_in(Path(recipe.run.dir))
    named = {
        "data.preferences" if offline else "prompts.train": (
            of_rows(recipe.data.preferences if offline else source, prompts)
        ),
        "prompts.eval": of_rows(recipe.prompts.eval, held_out_rows),
        **{f"rewards.{name}": of_file(digest) for name, digest in rewards.sources.items()},
        **{f"eval.metrics.{name}": of_file(digest) for name, digest in metrics.sources.items()},
    }
    return Data(rewards, metrics, prompts, eval_prompts, offline, named)
