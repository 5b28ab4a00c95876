"""Rewards: what gives each picture a number, and sets of them.

>>> from dgpo.rewards import load_rewards
>>> load_rewards(["redness", "brightness"]).weights
{'redness': 1.0, 'brightness': 1.0}
"""

from dgpo.rewards.reward import Reward, RewardFailure, RewardFunction
from dgpo.rewards.set import RewardSet, Scored, Scores, load_rewards

__all__ = [
    "Reward",
    "RewardFailure",
    "RewardFunction",
    "RewardSet",
    "Scored",
    "Scores",
    "load_rewards",
]
