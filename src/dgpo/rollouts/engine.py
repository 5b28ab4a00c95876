"""An engine makes the rollouts that the loop requests, with the weights that the loop names."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
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
    """A ``RolloutRequest`` asks for one batch of pictures.

    Args:
        texts: B prompts.
        cond: their embeddings, for an engine that shares the policy's memory.
        seeds: B seeds, each for everything that is drawn for its row, so that a picture depends on
            its text, its seed and the weights, and not on its batch.
        steps: ``num_inference_steps``.
        guidance_scale: the guidance; 1 is none.
        scheduler: the sampler, an object of diffusers; None for the pipeline's own.
        record: the steps whose tensors a policy gradient needs. Methods on noised samples need the
            last sample alone and record nothing.
    """

    texts: Sequence[str]
    cond: Conditioning
    seeds: Sequence[int]
    steps: int
    guidance_scale: float = 1.0
    scheduler: Any = None
    record: bool | Container[int] = False


class RolloutEngine(Protocol):
    """A ``RolloutEngine`` makes the pictures of a run."""

    servers: int = 1
    """How many batches it makes at the same time."""

    @property
    def apart(self) -> bool:
        """Return whether it may make pictures while the policy is trained."""
        return False

    def holding(self, weights: RollingWeights) -> AbstractContextManager[None]:
        """Sample inside the block with the policy's present weights or with one of its averages."""
        ...

    def rollout(self, request: RolloutRequest) -> Rollout:
        """Return pictures, the last samples and the schedule, with rows as in the request.

        Raises:
            UserError: the engine cannot be reached, or cannot do what the request asks for.
        """
        ...

    def rollouts(self, requests: Iterable[RolloutRequest]) -> Iterator[Rollout]:
        """Yield the rollout of each request, in their order."""
        return map(self.rollout, requests)


class _Rolling(Protocol):
    model: PipelineModel

    def rolling(self, weights: RollingWeights = "policy") -> AbstractContextManager[None]: ...


class LocalEngine(RolloutEngine):
    """A ``LocalEngine`` samples with the policy's own pipeline.

    Args:
        policy: the policy, or any model that can put weights in place.
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
