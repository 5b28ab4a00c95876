"""Diffusers pipelines as models to sample from and to train."""

from dgpo.models.load import load_pipeline
from dgpo.models.pipeline import PipelineModel, Rollout
from dgpo.models.policy import Policy
from dgpo.models.schedulers import make_scheduler
from dgpo.models.snapshots import Snapshot
from dgpo.models.text import Conditioning

__all__ = [
    "Conditioning",
    "PipelineModel",
    "Policy",
    "Rollout",
    "Snapshot",
    "load_pipeline",
    "make_scheduler",
]
