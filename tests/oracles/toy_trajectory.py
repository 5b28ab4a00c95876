"""One step of a stochastic sampler with a linear denoiser in float64, for tests of losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgpo.algorithms.base import TrajectoryAlgorithm
from dgpo.core import Epsilon, FlowMatching, Groups, Level, Process, Trajectory

ALPHAS = torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)


class Steps:
    """Points whose predictions are ``xt @ W``, with W for the policy, the old and the reference.

    The steps are drawn from the old policy; the policy is off from it by ``moved``.
    """

    def __init__(
        self, algorithm: TrajectoryAlgorithm, groups: Groups, moved: float = 0.0, dims: int = 5
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.algorithm, self.groups = algorithm, groups
        self.process: Process = FlowMatching()
        self.levels = [Level(torch.tensor(1000 * s), s) for s in (0.7, 0.5)]
        if algorithm.sde.kind == "ddim":
            self.process = Epsilon(ALPHAS)
            self.levels = [self.process.level(torch.tensor(t)) for t in (700, 500)]
        batch = groups.index.shape[0]
        self.xt, self.z = normal(batch, 2, dims), normal(batch, 2, dims)
        self.old = normal(dims, dims)
        self.ref = self.old + 0.1 * normal(dims, dims)
        self.policy = (self.old + moved * normal(dims, dims)).requires_grad_()
        self.advantages = algorithm.advantages(normal(batch), groups)
        moments = algorithm.sde.moments(self.process, self.xt, self.xt @ self.old, *self.levels)
        self.xnext = moments.mean + moments.std * self.z

    def points(self, rows: Tensor | None = None, **changes: Any) -> Trajectory:
        rows = torch.arange(len(self.xt)) if rows is None else rows
        xt = self.xt[rows]
        fields: dict[str, Any] = {
            "xnext": self.xnext[rows],
            "ref": xt @ self.ref,
            "advantages": self.advantages[rows],
            **changes,
        }
        return Trajectory(
            xt=xt,
            level=self.levels[0],
            next_level=self.levels[1],
            process=self.process,
            sde=self.algorithm.sde,
            pred=xt @ self.policy,
            old=xt @ self.old,
            groups=self.groups.subset(rows),
            **fields,
        )

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.policy, retain_graph=True)[0]
