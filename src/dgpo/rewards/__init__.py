"""Rewards: functions ``(images, prompts, **metadata columns) -> one number for each image``.

A reward may carry an attribute ``check(prompts)``, called with all :class:`dgpo.prompts.Prompt`
rows before any compute is spent; it raises :class:`dgpo.errors.UserError` for rows that it cannot
score.
"""

from dgpo.rewards.call_limits import RewardFailure
from dgpo.rewards.set import RewardFunction, RewardSet, Scored, Scores, load_rewards

__all__ = ["RewardFailure", "RewardFunction", "RewardSet", "Scored", "Scores", "load_rewards"]
