"""The work of the denoisers, counted where they run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dgpo.distributed.processes import SINGLE, Processes

COUNTED = ("images", "forwards", "backwards")
"""The totals, as ``metrics.jsonl`` calls them."""


class Counter:
    """A ``Counter`` counts an iteration's pictures, denoiser evaluations and backward passes.

    ``forwards`` adds up the batch sizes of all calls of the denoisers while training: rollouts and
    training passes, snapshots, and both halves of guidance. ``backwards`` adds up the batch sizes
    of the calls through which a gradient came back. What runs between two iterations, such as an
    evaluation, is left out; so is the second forward pass of gradient checkpointing, which runs
    inside the denoiser.

    It is a context manager, and listens to the denoisers inside the block.

    Args:
        denoisers: those of the pipeline.
    """

    def __init__(self, denoisers: Iterable[nn.Module]) -> None:
        self._denoisers = list(denoisers)
        self._hooks: list[Any] = []
        self._now = dict.fromkeys(COUNTED, 0)

    def __enter__(self) -> Counter:
        self._hooks = [d.register_forward_hook(self._note) for d in self._denoisers]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def begin(self) -> None:
        """Begin an iteration: forget what ran since the last one, or in one that was cut off."""
        self._now = dict.fromkeys(COUNTED, 0)

    def end(self, images: int, processes: Processes = SINGLE) -> dict[str, int]:
        """End an iteration that made ``images`` pictures. Collective.

        Returns:
            What was counted in all processes together.
        """
        every = processes.all_gather_object(self._now, "the end of an iteration")
        return {name: sum(one[name] for one in every) for name in COUNTED} | {"images": images}

    def _note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        made = output[0]  # from a tuple, or from an output class of diffusers
        self._now["forwards"] += len(made)
        for part, rows in (
            [(made, len(made))] if isinstance(made, Tensor) else [(m, 1) for m in made]
        ):
            if part.requires_grad:
                # counted when the gradient comes, as not every pass is followed by a backward
                part.register_hook(lambda gradient, rows=rows: self._came_back(rows))

    def _came_back(self, rows: int) -> None:
        self._now["backwards"] += rows
