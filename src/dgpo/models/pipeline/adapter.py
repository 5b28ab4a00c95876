"""The pipeline is the denoiser.

Rollouts call a diffusers pipeline as a user would, with precomputed prompt embeddings. Training
calls the same pipeline at one point ``(x_t, t)`` and takes what it would hand to
``scheduler.step``, with gradients. Packing of latents, scaling of timesteps, the sign of the
output, guidance and the choice between experts all stay diffusers' own code.

This module turns prompts and rows into calls; :mod:`dgpo.models.pipeline.calls` makes each call.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgpo.core.process import Level, Process
from dgpo.distributed.lockstep import Turn, even_turns
from dgpo.distributed.processes import SINGLE, Processes
from dgpo.distributed.sharding import any_sharded
from dgpo.errors import UserError
from dgpo.models.pipeline import row_groups
from dgpo.models.pipeline.call_encoders import check_text_is_given_once, encoder_of
from dgpo.models.pipeline.calls import PipelineCalls
from dgpo.models.pipeline.encoding_ahead import encode_ahead
from dgpo.models.pipeline.families import family_of
from dgpo.models.pipeline.prompt_cache import PromptCache
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.samplers.schedulers import process_of
from dgpo.models.weights.memory import TextEncoders, free_text_encoders


class PipelineModel(PipelineCalls):
    """A ``PipelineModel`` is a pipeline of diffusers that can be sampled from and trained.

    >>> from dgpo.models import PipelineModel, load_pipeline
    >>> model = PipelineModel(load_pipeline("pocket"))
    >>> cond = model.encode(["a photo of a red square", "a cat"], guidance=True)
    >>> made = model.rollout(cond, steps=3, guidance_scale=3.0)
    >>> len(made.images), made.images[0].size
    (2, (32, 32))
    >>> model.predict(made.x0, made.levels[0], cond).shape == made.x0.shape
    True

    Args:
        pipe: the pipeline. Its modules stay in place; nothing is wrapped or re-implemented.
        call: extra keyword arguments of the pipeline's call (``height``, ``width``,
            ``max_sequence_length``, ...). Those that ``encode_prompt`` takes reach it too.
        prompt_cache: a folder in which prompt embeddings are kept; None to keep them in memory
            only.
        processes: those over which the weights of the denoiser are sharded, if they are. Rollouts
            and predictions are collective then.

    Raises:
        UserError: the pipeline cannot be trained, or ``call`` holds an argument it does not take.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        call: Mapping[str, Any] | None = None,
        prompt_cache: str | Path | None = None,
        processes: Processes = SINGLE,
    ) -> None:
        super().__init__(pipe, call)
        # whole weights need no lockstep, and asking the others at every pass would cost time
        self._processes = processes if self.sharded else SINGLE
        self.process: Process = process_of(pipe.scheduler)
        self._one_row = family_of(pipe).one_row
        disk = None if prompt_cache is None else PromptCache(prompt_cache, pipe)
        self._encoder = encoder_of(pipe, self.call, disk)

    @property
    def sharded(self) -> bool:
        """Return whether the weights of the denoiser are spread over the processes, which must then
        make the same passes (:mod:`dgpo.distributed.lockstep`)."""
        return any_sharded(self.denoisers.values())

    @property
    def encodes_negative(self) -> bool:
        """Return whether the pipeline's own ``encode_prompt`` encodes the negative prompt, too."""
        return "do_classifier_free_guidance" in self._encoder.parameters

    def encode(self, prompts: Sequence[str], guidance: bool) -> Conditioning:
        """Return the embeddings of prompts, a row each; with ``guidance`` also of the negative one.

        A :class:`~dgpo.prompts.caption.Caption` brings its pictures along. Each distinct prompt is
        encoded once in the life of this object, as long as memory allows.

        Raises:
            UserError: there are no prompts, or only some of them have pictures.
        """
        cond = self._encoder.encode(prompts, guidance)
        return row_groups.with_pictures(cond, prompts, self.parameters)

    def prefetch(self, prompts: Sequence[str]) -> None:
        """Read the embeddings of prompts that will be asked for next from the prompt cache, if
        there is one, while the caller goes on."""
        self._encoder.prefetch(prompts)

    def check_pictures(self, prompts: Sequence[str]) -> None:
        """Refuse prompts whose pictures cannot be sampled side by side.

        Raises:
            UserError: they lead to samples of different size.
        """

        def shape_of(prompt: str) -> tuple[int, ...]:
            return self.shape_of(self.arguments(self.encode([prompt], guidance=False), 1.0))

        if "image" in self.parameters:
            row_groups.check_sizes(prompts, shape_of)

    def encode_and_free(self, prompts: Iterable[str], processes: Processes = SINGLE) -> None:
        """Encode all prompts and let go of the text encoders. From then on embeddings come from the
        prompt cache. Collective.

        Args:
            prompts: all that will be asked for.
            processes: they share the work.

        Raises:
            UserError: there is no prompt cache, or the pipeline encodes at every call.
        """
        check_text_is_given_once(self.pipe, "free_text_encoders")
        if self._encoder.disk is None:
            raise UserError("memory.free_text_encoders: set memory.prompt_cache, a folder")
        encode_ahead(self._encoder, prompts, processes)
        free_text_encoders(self.pipe)

    def offload_text_encoders(self) -> None:
        """Keep the text encoders on the CPU from now on, except while prompts are encoded.

        Raises:
            UserError: the pipeline encodes at every call.
        """
        check_text_is_given_once(self.pipe, "offload_text_encoders")
        self._encoder.offloaded = TextEncoders(self.pipe)

    @torch.no_grad()
    def rollout(
        self,
        cond: Conditioning,
        *,
        steps: int,
        guidance_scale: float = 1.0,
        scheduler: Any = None,
        generators: list[torch.Generator] | None = None,
        decode: bool = True,
        record: bool | Container[int] = False,
    ) -> Rollout:
        """Sample one picture for each row of ``cond`` by calling the pipeline.

        Args:
            cond: embeddings of B prompts.
            steps: ``num_inference_steps``.
            guidance_scale: 1 is no guidance; any other value is the pipeline's own
                ``true_cfg_scale`` or ``guidance_scale``.
            scheduler: the sampler; None for the pipeline's own. A fresh copy runs.
            generators: one a row, so that a picture does not depend on its batch; None for the
                global random state.
            decode: whether to decode pictures.
            record: whether to keep the tensors of every step; or the places of the steps to keep,
                counted from 0.

        Raises:
            UserError: a wrong number of generators, or guidance that the pipeline does not have.
        """
        if generators is not None and len(generators) != cond.size:
            raise UserError(f"got {len(generators)} generators for {cond.size} rows")
        turns, made = self._turns(cond), []
        for turn in turns:
            # a row's generator goes with it: its noise does not depend on who shares the call
            part = cond.rows(turn.rows) if len(turn.rows) < cond.size else cond
            rollout = self.sample(
                self.arguments(part, guidance_scale),
                steps,
                row_groups.for_rows(scheduler, turn.rows),
                None if generators is None else [generators[row] for row in turn.rows.tolist()],
                decode and turn.counts,
                record,
            )
            made += [rollout] if turn.counts else []
        return row_groups.joined(made, [turn.rows for turn in turns if turn.counts])

    def predict(
        self, xt: Tensor, level: Level, cond: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """Return what the pipeline hands to ``scheduler.step`` at ``xt``, with gradients.

        Args:
            xt: [B, ...], in the denoiser's input space.
            level: one noise level for all rows; its timestep is what the denoiser is given.
            cond: B rows.
            guidance_scale: the scale, like that of :meth:`rollout`.

        Returns:
            [B, ...], shaped like ``xt``: the velocity, epsilon or v that :attr:`process` speaks of.

        Raises:
            ValueError: ``xt`` does not have the shape of the loop's latents, or ``cond`` does not
                have B rows.
        """
        if xt.shape[0] != cond.size:
            raise ValueError(f"got {xt.shape[0]} samples and conditioning for {cond.size}")
        turns = self._turns(cond)
        if len(turns) == 1:
            return self.evaluate(xt, level.timestep, self.arguments(cond, guidance_scale))
        made: list[Tensor] = []
        for turn in turns:
            arguments = self.arguments(cond.rows(turn.rows), guidance_scale)
            output = self.evaluate(xt[turn.rows], level.timestep, arguments)
            if turn.counts:
                made.append(output)
            else:  # in the graph of the result: its backward pass is collective, too
                made[0] = made[0] + 0 * output.flatten()[0]
        return row_groups.in_order(made, [turn.rows for turn in turns if turn.counts])

    def _turns(self, cond: Conditioning) -> list[Turn]:
        """Return a turn for each call, as many in every process where weights are sharded.

        Collective then.
        """
        return even_turns(row_groups.parts(cond, self._one_row), self._processes)

    def has_guidance(self, cond: Conditioning) -> bool:
        """Return whether classifier-free guidance can be switched on for this conditioning."""
        return self.guidance.exists(cond)
