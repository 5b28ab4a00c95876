"""A row for every algorithm of the registry: the settings that it declares for its tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dgpo import registry
from dgpo.algorithms import Algorithm, BaseAlgorithm, TrajectoryAlgorithm
from dgpo.core import FlowMatching


@dataclass(frozen=True)
class Row:
    """An algorithm on noised samples.

    Args:
        algorithm: with settings that show all its terms on points whose d is of the order of one.
        learns: settings with which it learns the task of learning.py in 100 iterations.
        pulls_to_old: a sample with A = 0 still pulls the policy to the old one, so that the
            gradient is zero only where the two agree.
        step_each_level: it learns with a step after each level.
    """

    algorithm: Algorithm
    learns: dict[str, Algorithm]
    pulls_to_old: bool = False
    step_each_level: bool = False

    @property
    def reward_part(self) -> Algorithm:
        """The algorithm without its KL term."""
        return changed(self.algorithm, kl=0.0)


def changed(algorithm: Algorithm, **settings: Any) -> Algorithm:
    """With other settings, as far as the algorithm has them."""
    own = {key: value for key, value in settings.items() if key in type(algorithm).model_fields}
    return type(algorithm).model_validate({**algorithm.model_dump(), **own})


def kinds(points: str) -> dict[str, Any]:
    """The registered classes that train on these points, by their names."""
    found = {name: registry.resolve("algorithm", name) for name in registry.ALGORITHMS}
    return {name: kind for name, kind in found.items() if kind.points == points}


def learns(kind: type[BaseAlgorithm]) -> dict[str, Any]:
    """The algorithm with each of the settings with which it learns."""
    return {name: kind.model_validate(own) for name, own in kind.contract.learns.items()}


def forward() -> dict[str, Row]:
    """The algorithms on noised samples."""
    return {
        name: Row(
            kind.model_validate(kind.contract.terms),
            learns(kind),
            kind.contract.pulls_to_old,
            kind.contract.each_level,
        )
        for name, kind in kinds("forward").items()
    }


def trajectory() -> dict[str, TrajectoryAlgorithm]:
    """The policy gradients on trajectories, each with every sampler that it takes."""
    return {
        f"{name} {sde}": kind.model_validate({**kind.contract.terms, "sde": {"kind": sde}})
        for name, kind in kinds("trajectory").items()
        for sde in kind.sde_kinds
    }


def trajectory_learns() -> dict[str, TrajectoryAlgorithm]:
    """The policy gradients on trajectories with the settings with which they learn."""
    return {
        f"{name} {variant}": algorithm
        for name, kind in kinds("trajectory").items()
        for variant, algorithm in learns(kind).items()
    }


def predicts_noise(name: str) -> bool:
    """Whether an algorithm's sampler needs a denoiser that predicts epsilon or v."""
    sde = getattr(registry.resolve("algorithm", name)(), "sde", None)
    return sde is not None and not sde.fits(FlowMatching())


FORWARD, TRAJECTORY, TRAJECTORY_LEARNS = forward(), trajectory(), trajectory_learns()
