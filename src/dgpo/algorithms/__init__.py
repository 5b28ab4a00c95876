"""One algorithm, one file. An algorithm is its validated settings and its four decisions: which
points it trains on, which snapshots it needs, how rewards become advantages, and the loss.

A class of the registry is imported when it is first asked for::

    from dgpo.algorithms import DGPO, FlowGRPO

Type checkers see its settings where it is imported from its own module, such as
``dgpo.algorithms.flow_grpo``.
"""

from __future__ import annotations

from typing import Any

from dgpo import registry
from dgpo.algorithms.base import Algorithm, BaseAlgorithm, TrajectoryAlgorithm

__all__ = ["Algorithm", "BaseAlgorithm", "TrajectoryAlgorithm"]


def _classes() -> dict[str, str]:
    """The names of the registered classes, and what the registry calls them."""
    table = registry.ALGORITHMS.items()
    return {entry.path.rpartition(":")[2]: name for name, entry in table}


def __getattr__(name: str) -> Any:
    classes = _classes()
    if name not in classes:
        near = registry.nearest(name, classes)
        raise AttributeError(f"module 'dgpo.algorithms' has no attribute {name!r}{near}")
    return registry.resolve("algorithm", classes[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *_classes()})
