"""Flow-GRPO trains flow matching models by online RL (arXiv 2505.05470).

Let ``mu`` be the mean of the sampler's step and ``log p`` its log-density, the mean over all
dimensions. The loss of a step is
    mean_i max(-A_i r_i, -A_i clip(r_i, 1 - c, 1 + c)) + k mean_i |mu - mu_ref|^2 / (2 rate^2)   (1)
    r_i = exp(log p(x'_i) - log p_old(x'_i))                                                     (2)
Flow-GRPO-Fast and MixGRPO (arXiv 2507.21802) are the same with noise in a ``window`` of steps;
DanceGRPO (arXiv 2505.07818) is the same with ``sde: {kind: dance}`` and kl 0; the sampler of
arXiv 2509.05952 is ``sde: {kind: cps}``.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from dgpo.algorithms.contract import Contract
from dgpo.algorithms.policy_gradient import PolicyGradient
from dgpo.algorithms.surrogate import ppo
from dgpo.core.points import Trajectory
from dgpo.core.sde import Moments


class FlowGRPO(PolicyGradient):
    """Flow-GRPO is PPO on the log-densities of the sampler's steps.

    Differs from the paper: the last step of the sampler is deterministic and not trained; the
    log-density is the mean over dimensions, as in the published runs.

    >>> FlowGRPO(sde={"kind": "dance"}, kl=0).snapshots  # DanceGRPO needs no reference
    frozenset()
    >>> FlowGRPO(window={"size": 2, "mode": "sliding"}).noisy_steps(steps=10, iteration=3, seed=0)
    range(3, 5)
    """

    name: ClassVar[str] = "flow_grpo"
    # with few dimensions ratios vary more than those of pictures: the clip is wider
    contract: ClassVar[Contract] = Contract(
        terms={"clip": 0.1},
        learns={
            "flow": {"clip": 0.1, "kl": 1e-3},
            "cps": {"clip": 0.1, "kl": 1e-3, "sde": {"kind": "cps"}},
            "dance": {"clip": 0.1, "kl": 1e-3, "sde": {"kind": "dance", "noise_level": 0.7}},
            "fast": {"clip": 0.1, "kl": 1e-3, "window": {"size": 2, "last": 4}},
            "mix": {"clip": 0.1, "kl": 0, "window": {"size": 4, "mode": "sliding", "every": 5}},
        },
    )
    clip: float = Field(default=1e-4, gt=0, lt=1)
    """The largest change of the ratio, in either direction."""

    def surrogate(
        self, points: Trajectory, now: Moments, old: Moments, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = points.log_prob(now) - points.log_prob(old)
        return ppo(log_ratio, advantages, self.clip)
