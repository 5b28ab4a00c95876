"""Draws groups of pictures to be ranked, one after the other, as a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dgpo.core.seeds import stream
from dgpo.errors import UserError
from dgpo.media import Lost
from dgpo.models.load import load_for_sampling
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.prompts import Prompt, PromptSampler, load_prompts, refuse_sizes
from dgpo.recipe import Recipe


class Artist:
    """Draws groups with a recipe's model, prompts and rollout settings.

    A group depends on the seed and its place alone, so that drawing goes on where it was stopped.

    Args:
        recipe: its ``model``, ``precision``, ``prompts.train``, ``group_size``, ``rollout`` and
            ``seed`` are used.
        lora: a LoRA, to rank what was trained already; see :func:`~dgpo.models.loras.load_lora`.

    Raises:
        UserError: there are no prompts, or the model cannot be loaded.
    """

    def __init__(self, recipe: Recipe, lora: Path | None = None) -> None:
        self._recipe = recipe
        prompts = load_prompts(recipe.prompts.train)
        refuse_sizes(prompts, recipe.rollout.call)
        self._prompts = PromptSampler(prompts, 1, recipe.seed)
        own = recipe.memory.vae_precision
        pipe = load_for_sampling(recipe.model, recipe.precision, lora=lora, vae_precision=own)
        self._model = PipelineModel(pipe, call=recipe.rollout.call)
        self._scheduler = make_scheduler(recipe.rollout.scheduler, pipe.scheduler)

    @torch.no_grad()
    def draw(self, place: int) -> tuple[Prompt, list[Image.Image]]:
        """Draw a prompt and ``group_size`` pictures of it, fewer if some are lost.

        Args:
            place: the group's number, counted from 0.

        Raises:
            UserError: fewer than two are left.
        """
        recipe, rollout = self._recipe, self._recipe.rollout
        (prompt,) = self._prompts.at(place)
        cond = self._model.encode([prompt.text], guidance=rollout.guidance_scale != 1)
        images: list[Any] = []
        for rows in torch.arange(recipe.group_size).split(rollout.batch or recipe.group_size):
            made = self._model.rollout(
                cond.rows(torch.zeros_like(rows)),
                steps=rollout.steps,
                guidance_scale=rollout.guidance_scale,
                scheduler=self._scheduler,
                generators=[stream(recipe.seed, "rank", place, row) for row in rows.tolist()],
            )
            images += made.images or []
        there = [one for one in images if not isinstance(one, Lost)]
        if len(there) < 2:
            why = next(one.why for one in images if isinstance(one, Lost))
            raise UserError(f"of {prompt.text!r:.80} fewer than two pictures can be shown: {why}")
        return prompt, there
