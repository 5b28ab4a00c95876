"""What was sampled before its iteration began, as a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgpo.core.process import Level
from dgpo.distributed.assignment import Assignment
from dgpo.media import Lost, made_of, stacked, unstacked
from dgpo.models.pipeline.rollout import Rollout


@dataclass(frozen=True)
class PrefetchedRollout:
    """The pictures of an iteration that were sampled before it, by weights that are gone since.

    Args:
        made: this process's share of them.
        seconds: the time that sampling took.
        during: the iteration before whose update they were sampled.
    """

    made: Rollout
    seconds: float
    during: int


class Prefetched(NamedTuple):
    """Prefetched pictures as tensors and JSON."""

    tensors: dict[str, Tensor]
    """Tensors by ``ITERATION.x0``, ``ITERATION.images``, ``ITERATION.lost`` and
    ``ITERATION.timesteps``: the rows of all processes, in the order of their places, on the CPU."""
    facts: dict[str, Any]
    """Facts by the iteration's number."""


NOTHING = Prefetched({}, {})


def pack(
    pending: Mapping[int, PrefetchedRollout],
    assignments: Mapping[int, Assignment],
    made_for: Mapping[int, Any],
) -> Prefetched:
    """What the processes hold, as one. Collective.

    Args:
        pending: by the iteration whose pictures they are.
        assignments: this process's part of each.
        made_for: JSON values by which :func:`unpack`'s caller knows what the pictures show.
    """
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for iteration, one in sorted(pending.items()):
        made, assignment = one.made, assignments[iteration]
        assert made.images is not None and not made.steps, "policy gradients sample nothing ahead"
        images, media = stacked([made_of(image) for image in made.images])
        lost = torch.tensor([isinstance(image, Lost) for image in made.images])
        tensors |= {
            f"{iteration}.x0": assignment.whole(made.x0.cpu()).contiguous(),
            f"{iteration}.images": assignment.whole(images).contiguous(),
            f"{iteration}.lost": assignment.whole(lost).contiguous(),
            f"{iteration}.timesteps": torch.stack([level.timestep.cpu() for level in made.levels]),
        }
        facts[str(iteration)] = {
            "made_for": made_for[iteration],
            "during": one.during,
            "seconds": one.seconds,
            "sigmas": [level.sigma for level in made.levels],
            "media": media,
        }
    return Prefetched(tensors, facts)


def unpack(
    packed: Prefetched, iteration: int, assignment: Assignment, device: torch.device
) -> PrefetchedRollout:
    """This process's share of what was packed.

    Args:
        iteration: whose pictures are wanted.
        assignment: this process's part; the number of processes may be another than before.
        device: the model's.
    """
    facts = packed.facts[str(iteration)]
    x0, images, timesteps = (
        packed.tensors[f"{iteration}.{name}"] for name in ("x0", "images", "timesteps")
    )
    pairs = zip(timesteps.to(device), facts["sigmas"], strict=True)
    # checkpoints of earlier versions do not say what was lost
    lost = packed.tensors.get(f"{iteration}.lost", torch.zeros(len(x0), dtype=torch.bool))
    lost = lost[assignment.mine].tolist()
    shown = zip(unstacked(images[assignment.mine], facts["media"]), lost, strict=True)
    made = Rollout(
        x0[assignment.mine].to(device),
        [Lost("it was lost when it was sampled", one) if gone else one for one, gone in shown],
        [Level(timestep, sigma) for timestep, sigma in pairs],
    )
    return PrefetchedRollout(made, facts["seconds"], facts["during"])
