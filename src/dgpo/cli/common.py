"""What commands share: how they end, alone or as one of several processes, and how tables look."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells expect it."""


def is_main_process() -> bool:
    """Return whether this process speaks for all that a launcher started, and connect them."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True  # without the seconds that importing torch takes
    from dgpo.distributed import current_processes

    return current_processes().main


def tell_the_others(error: Exception) -> None:
    """End the other processes of the run, if there are any, for this error too."""
    if "dgpo.distributed.processes" in sys.modules:
        from dgpo.distributed.processes import tell

        tell(error)


def new_table() -> tuple[Console, Table]:
    """Return an empty table and where to print it; a pipe has room for long rows."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    return console, Table(box=None, pad_edge=False, header_style="bold")
