"""Groups of pictures that were ranked before, as folders that offline training reads."""

from dgpo.preferences.groups import (
    FILE,
    GroupWriter,
    RankedGroup,
    read_groups,
    refuse_existing_groups,
)

__all__ = ["FILE", "GroupWriter", "RankedGroup", "read_groups", "refuse_existing_groups"]
