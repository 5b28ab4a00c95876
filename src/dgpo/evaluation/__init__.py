"""Evaluation on held-out prompts: metrics, benchmarks, and reports with confidence intervals.

The names are imported when they are first used, so that a benchmark is found without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgpo.evaluation.metrics import Interval, Metrics
    from dgpo.evaluation.scoring import (
        Report,
        Sampling,
        evaluate,
        sample_images,
        score,
        stratified_mean,
    )

__all__ = [
    "Interval",
    "Metrics",
    "Report",
    "Sampling",
    "evaluate",
    "sample_images",
    "score",
    "stratified_mean",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "metrics" if name in ("Interval", "Metrics") else "scoring"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
