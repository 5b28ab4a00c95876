"""The mathematics alone: groups, noising processes, noise levels and the points of a loss.

Imports torch, pydantic and the standard library only; a test holds it to that.
"""

from dgpo.core.groups import Groups
from dgpo.core.points import Forward
from dgpo.core.process import Epsilon, FlowMatching, Level, Process, VPrediction
from dgpo.core.timesteps import TimestepChoice

__all__ = [
    "Epsilon",
    "FlowMatching",
    "Forward",
    "Groups",
    "Level",
    "Process",
    "TimestepChoice",
    "VPrediction",
]
