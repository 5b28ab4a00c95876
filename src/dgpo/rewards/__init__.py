"""Rewards: functions ``(images, prompts, **metadata columns) -> one number for each image``.

A reward may carry an attribute ``check(prompts)``, called with all :class:`dgpo.prompts.Prompt`
rows before any compute is spent; it raises :class:`dgpo.errors.UserError` for rows that it cannot
score.
"""

from dgpo.rewards.base import RewardFunction, RewardSet, Scores, load_rewards

__all__ = ["RewardFunction", "RewardSet", "Scores", "load_rewards"]
