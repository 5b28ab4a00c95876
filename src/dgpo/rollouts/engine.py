"""The seam between the loop and what samples: a request, its answer, and the weights in between."""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.policy import RollingWeights


@dataclass(frozen=True)
class RolloutRequest:
    """One batch of pictures.

    Args:
        texts: B prompts.
        cond: their embeddings, for an engine that shares the policy's memory.
        seeds: of each row's initial noise and of all that is drawn for it: a picture is a function
            of its text, its seed and the weights, not of its batch.
        steps: ``num_inference_steps``.
        guidance_scale: 1 is no guidance.
        scheduler: the sampler, an object of diffusers; None for the pipeline's own.
        record: places of the steps whose tensors are wanted, for a policy gradient; none for the
            methods on noised samples, which need the last sample alone.
    """

    texts: Sequence[str]
    cond: Conditioning
    seeds: Sequence[int]
    steps: int
    guidance_scale: float = 1.0
    scheduler: Any = None
    record: bool | Container[int] = False


class RolloutEngine(Protocol):
    """What makes the pictures of a run."""

    def holding(self, weights: RollingWeights) -> AbstractContextManager[None]:
        """The policy's present weights, or one of its averages, are those that sample inside the
        block: put in place, or sent."""
        ...

    def rollout(self, request: RolloutRequest) -> Rollout:
        """Pictures, the last samples, and the schedule; rows as in the request.

        Raises:
            UserError: the engine cannot be reached, or cannot do what is asked.
        """
        ...


class _Rolling(Protocol):
    model: PipelineModel

    def rolling(self, weights: RollingWeights = "policy") -> AbstractContextManager[None]: ...


class LocalEngine:
    """The policy's own pipeline samples, with the policy's own weights.

    Args:
        policy: or any model that can put weights in place.
    """

    def __init__(self, policy: _Rolling) -> None:
        self._policy = policy

    def holding(self, weights: RollingWeights) -> AbstractContextManager[None]:
        return self._policy.rolling(weights)

    def rollout(self, request: RolloutRequest) -> Rollout:
        return self._policy.model.rollout(
            request.cond,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            scheduler=request.scheduler,
            generators=[torch.Generator().manual_seed(seed) for seed in request.seeds],
            record=request.record,
        )
