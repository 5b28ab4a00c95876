"""Rollouts are made by the policy itself, or by an engine in another process.

See docs/scaling.md, "Rollouts by another engine".
"""

from dgpo.rollouts.engine import LocalEngine, RolloutEngine, RolloutRequest

__all__ = ["LocalEngine", "RolloutEngine", "RolloutRequest"]
