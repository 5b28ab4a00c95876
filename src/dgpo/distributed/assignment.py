"""The assignment of an iteration's pictures to processes, and the scores of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dgpo.distributed.lockstep import pieces
from dgpo.distributed.processes import SINGLE, Processes
from dgpo.errors import UserError


@dataclass(frozen=True)
class Assignment:
    """An ``Assignment`` says which pictures of an iteration each process makes.

    Args:
        places: the places of its pictures among all, [n] ascending, for every process.
        size: pictures of a group.
        processes: those of the run.
    """

    places: tuple[Tensor, ...]
    size: int
    processes: Processes = SINGLE

    @classmethod
    def of(cls, groups: int, size: int, parts: int, processes: Processes = SINGLE) -> Assignment:
        """Give every process an equal share, up to one picture.

        Whole groups stay in one process if their number allows it.

        Args:
            groups: the number of groups of the iteration.
            size: pictures of a group.
            parts: equal runs of groups, each of which every process has a share of: an optimiser
                step is made on one of them.
            processes: those of the run.

        Raises:
            UserError: a process would have no picture.
        """
        every = groups * size
        # with none, a process would have no row for dummy passes either
        if every // parts < processes.size:
            raise UserError(
                f"{processes.size} processes for {every // parts} pictures of an optimiser step "
                f"(group_size = {size}, groups_per_iteration = {groups}): start fewer processes, "
                "or raise one of the two"
            )
        return cls(processes.split(every, parts), size, processes)

    @property
    def mine(self) -> Tensor:
        """Return the places of this process's pictures, [n]."""
        return self.places[self.processes.rank]

    @property
    def count(self) -> int:
        """Return the number of groups of the iteration."""
        return sum(map(len, self.places)) // self.size

    @property
    def groups(self) -> Tensor:
        """Return the group of each of this process's pictures, [n]."""
        return self.mine // self.size

    @property
    def held(self) -> Tensor:
        """Return the groups of which this process has pictures, ascending."""
        return self.groups.unique()

    @property
    def rows(self) -> Tensor:
        """For each of this process's pictures, the row of its group in :attr:`held`, [n]."""
        return torch.searchsorted(self.held, self.groups)

    def find(self, places: Tensor) -> Tensor:
        """Return the rows, in this process, of places that are its own."""
        return torch.searchsorted(self.mine, places)

    def divided(self, places: Tensor) -> tuple[Tensor, ...]:
        """Return which of the given places each process has."""
        return tuple(places[torch.isin(places, own)] for own in self.places)

    def splits(self, places: Tensor) -> bool:
        """Return whether a group of these places is spread over several processes."""
        held = [len((part // self.size).unique()) for part in self.divided(places)]
        return sum(held) > len((places // self.size).unique())

    def batches(self, size: int | None) -> Iterator[Tensor]:
        """Yield the rows of this process in batches of ``size``, as many in every process.

        The last ones may be empty. A run may be stopped between two of them. Collective.
        """
        most = max(map(len, self.places))
        for rows in pieces(torch.arange(len(self.mine)), size, most):
            self.processes.stop_if_asked("sampling a batch of pictures")
            yield rows

    def whole(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes in the order of their places, bit for bit. Collective.

        Args:
            rows: [n, ...] of this process, on the CPU.

        Returns:
            [N, ...].
        """
        if self.processes.single:
            return rows
        # a sum with zeros, as bytes: as numbers, 0 + -0.0 would be 0.0
        mine = rows.contiguous().view(torch.uint8)
        every = mine.new_zeros(sum(map(len, self.places)), *mine.shape[1:])
        every[self.mine] = mine
        return self.processes.sum(every).view(rows.dtype)

    def gather(
        self, values: Mapping[str, Tensor], lost: Mapping[int, str]
    ) -> tuple[dict[str, Tensor], dict[int, str]]:
        """Return the numbers of all pictures, and the groups that any process has lost. Collective.

        Args:
            values: by name, [n] or [n, k] each, on the CPU.
            lost: groups of this process, and why each is lost.

        Returns:
            The values by name, [N] or [N, k] in the order of places; and all lost groups.
        """
        if self.processes.single:
            return dict(values), dict(lost)
        # JSON texts keep every number exactly, and infinite ones and NaN
        said = {
            "values": {name: value.tolist() for name, value in values.items()},
            "lost": {str(group): why for group, why in lost.items()},
        }
        every = self.processes.all_gather_object(said, "the rewards of all pictures")
        # process after process is not the order of places: shares interleave with several parts
        order = torch.cat(self.places).argsort()
        found = {
            name: torch.tensor(
                [row for other in every for row in other["values"][name]], dtype=value.dtype
            )[order]
            for name, value in values.items()
        }
        gone = {int(group): why for other in every for group, why in other["lost"].items()}
        return found, dict(sorted(gone.items()))
