"""One algorithm, one file. An algorithm is its validated settings and its four decisions: which
points it trains on, which snapshots it needs, how rewards become advantages, and the loss."""

from dgpo.algorithms.base import Algorithm, Settings
from dgpo.algorithms.dgpo import DGPO

__all__ = ["DGPO", "Algorithm", "Settings"]
