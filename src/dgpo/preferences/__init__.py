"""Offline training reads folders with groups of pictures that were ranked before."""

from dgpo.preferences.groups import (
    FILE,
    GroupWriter,
    RankedGroup,
    read_groups,
    refuse_existing_groups,
)

__all__ = ["FILE", "GroupWriter", "RankedGroup", "read_groups", "refuse_existing_groups"]
