"""What a run will cost, before anything is loaded: sizes, counts of forward passes, memory."""

from dgpo.planning.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
