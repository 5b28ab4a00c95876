"""Policy gradients on trajectories learn a task of two dimensions in seconds.

Data are N(0, I), of which the optimal denoiser is known: a network that starts at zero is added to
it, and the rewarded point lies off the centre. Dimensions are few, so ratios vary more than those
of pictures, whose log-densities are means over thousands: the clip ranges are wider.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from algorithms.table import TRAJECTORY_LEARNS
from dgpo.algorithms import TrajectoryAlgorithm
from dgpo.core import Epsilon, FlowMatching, Groups, Level, Trajectory
from dgpo.registry import ALGORITHMS, resolve

STEPS, COUNT, SIZE = 8, 8, 16
GOAL = torch.tensor([1.5, -1.0])
ALPHAS = torch.linspace(1, 0, 1001)[1:].clamp_min(1e-3)


class Denoiser(nn.Module):
    def __init__(self, noise_prediction: bool) -> None:
        super().__init__()
        self.noise_prediction = noise_prediction
        self.net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 2))
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)

    def forward(self, xt: Tensor, s: float) -> Tensor:
        base = s if self.noise_prediction else (2 * s - 1) / ((1 - s) ** 2 + s**2)
        return base * xt + self.net(torch.cat([xt, torch.full_like(xt[:, :1], s)], 1))


def schedule(process: FlowMatching | Epsilon) -> list[Level]:
    if isinstance(process, FlowMatching):
        sigmas = [(STEPS - i) / STEPS for i in range(STEPS)]
        return [Level(torch.tensor(1000 * s), s) for s in sigmas]
    return [process.level(torch.tensor(t)) for t in range(999, 0, -1000 // STEPS)]


def end(process: FlowMatching | Epsilon, x: Tensor, output: Tensor, level: Level) -> Tensor:
    """The last step: to the clean sample."""
    return process.x0(x, output, level)


def reward(x0: Tensor) -> Tensor:
    return -(x0 - GOAL).norm(dim=1)


def train(algorithm: TrajectoryAlgorithm, iterations: int) -> tuple[float, float]:
    """What collection and update do, in a few lines; mean rewards before and after."""
    torch.manual_seed(0)
    process = Epsilon(ALPHAS) if algorithm.sde.kind == "ddim" else FlowMatching()
    levels, groups = schedule(process), Groups.contiguous(COUNT, SIZE)
    policy = Denoiser(isinstance(process, Epsilon))
    ref = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    history: list[float] = []
    for iteration in range(iterations):
        x, walked = torch.randn(COUNT * SIZE, 2), []
        trained = algorithm.noisy_steps(STEPS, iteration, 0)
        with torch.no_grad():
            for i, (level, then) in enumerate(pairwise(levels)):
                output = policy(x, level.sigma)
                if i in trained:
                    moments = algorithm.sde.moments(process, x, output, level, then)
                    xnext = moments.mean + moments.std * torch.randn_like(x)
                else:  # windows are for flows: a step of the ODE
                    xnext = x + (then.sigma - level.sigma) * output
                walked.append((x, xnext, output))
                x = xnext
            x0 = end(process, x, policy(x, levels[-1].sigma), levels[-1])
        history.append(float(reward(x0).mean()))
        advantages = algorithm.advantages(reward(x0), groups)
        for rows in torch.arange(COUNT * SIZE).chunk(algorithm.updates):
            for i in trained:
                xt, xnext, old = (tensor[rows] for tensor in walked[i])
                with torch.no_grad():
                    at_ref = ref(xt, levels[i].sigma)
                points = Trajectory(
                    xt=xt,
                    xnext=xnext,
                    level=levels[i],
                    next_level=levels[i + 1],
                    process=process,
                    sde=algorithm.sde,
                    pred=policy(xt, levels[i].sigma),
                    old=old,
                    ref=at_ref,
                    advantages=advantages[rows],
                    groups=groups.subset(rows),
                )
                (algorithm.loss(points)[0] / len(trained)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return history[0], math.fsum(history[-10:]) / 10


def test_every_registered_algorithm_is_here() -> None:
    kinds = [resolve("algorithm", name) for name in ALGORITHMS]
    wanted = {kind for kind in kinds if kind.points == "trajectory"}
    assert wanted == set(map(type, TRAJECTORY_LEARNS.values()))


@pytest.mark.parametrize("algorithm", TRAJECTORY_LEARNS.values(), ids=TRAJECTORY_LEARNS)
def test_reward_rises(algorithm: TrajectoryAlgorithm) -> None:
    start, after = train(algorithm, 25)
    assert start < -1.7
    assert after > start + 0.5
