"""DDPO trains diffusion models with reinforcement learning (arXiv 2305.13301).

It is PPO on the log-densities of DDIM's steps with noise, for models that predict noise or v: the
paper's importance-sampling estimator, section 4.3. The surrogate is that of Flow-GRPO.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from dgpo.algorithms.contract import Contract
from dgpo.algorithms.flow_grpo import FlowGRPO
from dgpo.core.sde import DDIM, AnySde


class DDPO(FlowGRPO):
    """DDPO is PPO on the steps of DDIM.

    Differs from the paper: advantages are normalised in the iteration's groups rather than by
    running statistics of each prompt; the last step is deterministic and not trained.

    >>> DDPO(sde={"kind": "ddim", "eta": 0.5}).sde
    DDIM(kind='ddim', eta=0.5)
    """

    name: ClassVar[str] = "ddpo"
    contract: ClassVar[Contract] = Contract(
        terms={"clip": 0.1, "kl": 0.02}, learns={"ddim": {"clip": 0.1}}
    )
    sde_kinds: ClassVar[tuple[str, ...]] = ("ddim",)
    sde: AnySde = DDIM()
    """The sampler of the rollouts; with eta 1 it is DDPM's."""
    kl: float = Field(default=0.0, ge=0)
    """The weight of ``mean (mu - mu_ref)^2 / (2 std^2)``; the paper has no such term."""
