"""Diffusers pipelines as models to sample from and to train."""

from dgpo.models.load import load_pipeline
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.policy import Policy
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.models.weights.snapshots import Snapshot

__all__ = [
    "Conditioning",
    "PipelineModel",
    "Policy",
    "Rollout",
    "Snapshot",
    "load_pipeline",
    "make_scheduler",
]
