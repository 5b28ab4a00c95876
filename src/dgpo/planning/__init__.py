"""Say what a run will cost before any weight is loaded: sizes, forward passes, memory."""

from dgpo.planning.machine import Machine
from dgpo.planning.plan import Plan, make_plan

__all__ = ["Machine", "Plan", "make_plan"]
