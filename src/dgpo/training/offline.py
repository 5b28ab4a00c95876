"""Training on groups that were ranked before: what an iteration needs, without a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any, Literal, cast

import torch

from dgpo.core.seeds import stream
from dgpo.distributed.assignment import Assignment
from dgpo.distributed.processes import SINGLE, Processes
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.picture_encoder import PictureEncoder
from dgpo.models.pipeline.rollout import Rollout
from dgpo.preferences import RankedGroup, read_groups
from dgpo.prompts import PromptSampler
from dgpo.recipe import Recipe
from dgpo.rewards import Scored
from dgpo.training.batch import build_batch
from dgpo.training.collector import Collected
from dgpo.training.prefetched import NOTHING, Prefetched

NAME = "preferences"
"""What the rewards of the folder are called in ``metrics.jsonl``."""


def ranked_prompts(recipe: Recipe) -> list[RankedGroup]:
    """The groups of ``data.preferences``, whose pictures have the recipe's size.

    Raises:
        UserError: see :func:`dgpo.preferences.read_groups`; or a group has fewer pictures than
            ``group_size``, or more and ``data.pick`` does not say which.
    """
    folder, call = recipe.data.preferences, recipe.rollout.call
    assert folder is not None
    groups = read_groups(folder, (call.get("width"), call.get("height")))
    for place, group in enumerate(groups):
        count, wanted = len(group.images), recipe.group_size
        if count < wanted or (count > wanted and recipe.data.pick == "all"):
            out = "lower group_size" if count < wanted else "set data.pick, or raise group_size"
            raise UserError(
                f"data.preferences = {folder!r}: group {place + 1} ({group.text!r:.60}) has "
                f"{count} pictures and group_size = {wanted}; {out}"
            )
    return groups


def picked(
    rewards: Sequence[float],
    size: int,
    pick: Literal["all", "random", "extremes"],
    generator: torch.Generator,
) -> list[int]:
    """Which ``size`` pictures of a group are compared.

    Args:
        rewards: the rewards of all its pictures, ``size`` or more.
        size: how many.
        pick: ``data.pick``.
        generator: what draws.

    Returns:
        their places: in the group's own order, or from both ends inwards (``extremes``: best,
        worst, second best, ...; of equals the first).
    """
    places = list(range(len(rewards)))
    if pick == "extremes":
        best = sorted(places, key=lambda place: -rewards[place])
        worst = sorted(places, key=lambda place: rewards[place])
        both = [place for pair in zip(best, worst, strict=True) for place in pair]
        return list(dict.fromkeys(both))[:size]
    if pick == "random" and size < len(places):
        return sorted(torch.randperm(len(places), generator=generator)[:size].tolist())
    return places


class RankedCollector:
    """What each iteration trains on, from groups that were ranked before.

    The clean samples are the pictures, encoded by the pipeline's own VAE; noise levels are those
    that its sampler would visit. From there on everything is as with pictures of the policy.

    Differs from rollouts: a picture that the model made itself comes back from its VAE with that
    one's loss, and is not the policy's own any more once that has moved.

    Args:
        model: the pipeline's, not yet trained.
        recipe: ``algorithm``, ``group_size``, ``data`` and ``rollout.steps``.
        prompts: draws each iteration's groups among those of :func:`ranked_prompts`.
        scheduler: the sampler whose noise levels are trained.
        processes: each encodes its share of the pictures.

    Raises:
        UserError: the pipeline cannot encode pictures.
    """

    def __init__(
        self,
        model: PipelineModel,
        recipe: Recipe,
        prompts: PromptSampler,
        scheduler: Any,
        processes: Processes = SINGLE,
    ) -> None:
        # there is one reward, the folder's: nothing to combine
        self._model, self._recipe = model, recipe.model_copy(update={"combine": "sum"})
        self._prompts, self._processes = prompts, processes
        text = prompts.prompts[0].text
        self._encoder = PictureEncoder(model, text)
        self._levels = model.rollout(
            model.encode([text], guidance=False),
            steps=recipe.rollout.steps,
            scheduler=scheduler,
            generators=[torch.Generator().manual_seed(0)],
            decode=False,
        ).levels

    def __call__(self, iteration: int) -> Collected:
        """What an iteration trains on; ``seconds["rollout"]`` is what encoding took.

        Args:
            iteration: counted from 0.

        Raises:
            UserError: a picture cannot be read, or has another size than the pipeline's.
            KeyboardInterrupt, Terminated: a signal has asked one of several processes to stop.
        """
        self._processes.stop_if_asked("reading an iteration's groups")
        began, recipe = monotonic(), self._recipe
        chosen = cast(list[RankedGroup], self._prompts.at(iteration))
        size, pick = recipe.group_size, recipe.data.pick
        rows = [
            (group, place)
            for number, group in enumerate(chosen)
            for place in picked(
                group.rewards, size, pick, stream(recipe.seed, "pick", iteration, number)
            )
        ]
        assignment = Assignment.of(len(chosen), size, 1, self._processes)
        mine = [rows[place] for place in assignment.mine.tolist()]
        x0 = torch.stack([self._encoder(group.images[place]) for group, place in mine])
        rewards = torch.tensor([group.rewards[place] for group, place in rows])
        texts = [chosen[number].text for number in assignment.held.tolist()]
        cond = self._model.encode(texts, guidance=recipe.algorithm.kl_guidance is not None)
        scored = Scored({NAME: rewards}, torch.ones(len(rows), 1, dtype=torch.float64))
        built = build_batch(recipe, scored, Rollout(x0, None, self._levels), cond, assignment)
        seconds = {"rollout": monotonic() - began, "reward": 0.0}
        return Collected(built.batch, built.figures, seconds)

    def pending(self, iteration: int) -> Prefetched:
        """Nothing: no iteration's pictures are made by the weights of an earlier one."""
        return NOTHING

    def restore(self, packed: Prefetched) -> list[str]:
        """What a checkpoint of the run before it was an offline one holds is not used."""
        return []
