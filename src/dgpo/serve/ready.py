"""Loads rewards, and refuses those that cannot be served, before the server takes its port."""

from __future__ import annotations

from collections.abc import Sequence

from dgpo.errors import UserError
from dgpo.rewards import RewardSet, load_rewards


def ready(names: Sequence[str]) -> list[RewardSet]:
    """Make sets of one reward each, with their models loaded.

    Args:
        names: the names of the rewards; a name that is given twice is served once.

    Raises:
        UserError: a name is unknown, or a reward cannot be served, or lacks something such as its
            weights.
    """
    sets = [load_rewards([name]) for name in dict.fromkeys(names)]
    for own in sets:
        _servable(own)
    for own in sets:  # all names first: a model takes its time
        own.load()
    return sets


def _servable(own: RewardSet) -> None:
    (name,) = own.names
    if own.names_with("asks_people"):
        raise UserError(f"--reward {name}: people answer on a page of their own: dgpo rank")
    if own.names_with("group_wise"):
        raise UserError(
            f"--reward {name}: it compares the pictures of a group, and a request is none; ask it "
            "in the process that trains"
        )
    if own.media == "sounds":
        raise UserError(
            f"--reward {name}: it scores sounds, and only pictures and videos are sent; ask it in "
            "the process that trains"
        )
