"""This room holds the mathematics alone: groups, noising processes, noise levels, stochastic
samplers, and the points that a loss sees.

It imports torch, pydantic and the standard library only; a test keeps it so.
"""

from dgpo.core.groups import Groups
from dgpo.core.points import Forward, Trajectory
from dgpo.core.process import Epsilon, FlowMatching, Level, Process, VPrediction
from dgpo.core.sde import CPS, DDIM, AnySde, DanceSDE, FlowSDE, Moments, Sde
from dgpo.core.timesteps import TimestepChoice
from dgpo.core.window import StepWindow

__all__ = [
    "CPS",
    "DDIM",
    "AnySde",
    "DanceSDE",
    "Epsilon",
    "FlowMatching",
    "FlowSDE",
    "Forward",
    "Groups",
    "Level",
    "Moments",
    "Process",
    "Sde",
    "StepWindow",
    "TimestepChoice",
    "Trajectory",
    "VPrediction",
]
