"""TensorBoard: events in ``tensorboard/`` of the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dgpo.run.loggers.base import LoggedRun, Logger


class TensorBoardLogger(Logger):
    """Writes TensorBoard events; a resumed run hides the events that it writes again.

    Args:
        images: write grids of pictures and tables of prompts too, not only figures.
    """

    def __init__(self, images: bool = False) -> None:
        self._images = images
        self._events: Any = None

    def begin(self, run: LoggedRun) -> None:
        self._events = event_writer(run.folder / "tensorboard", run.resumed_after)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._events.add_scalar(tag, value, step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        if self._images:
            self._events.add_image(name, np.asarray(image), step, dataformats="HWC")

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        if self._images:
            lines = [columns, ["---"] * len(columns), *rows]
            text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
            self._events.add_text(name, text, step)

    def end(self, failed: bool) -> None:
        self._events.close()


def event_writer(folder: Path, resumed_after: int | None) -> Any:
    """Open the events of a run, without those after the iteration that it goes on from."""
    # tensorboard takes a second to import: only a run that trains pays for it
    from torch.utils.tensorboard import SummaryWriter

    purge = None if resumed_after is None else resumed_after + 1
    return SummaryWriter(str(folder), purge_step=purge)
