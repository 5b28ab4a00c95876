"""One row for every algorithm: what the contract test holds it to, and its settings for the toy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dgpo.algorithms import (
    AWM,
    CRD,
    DGPO,
    RWR,
    Algorithm,
    BestOfN,
    DiffusionDPO,
    DiffusionNFT,
)


@dataclass(frozen=True)
class Row:
    """An algorithm on noised samples.

    Args:
        algorithm: with settings that show all its terms on points whose d is of the order of one.
        learns: settings with which it learns the task of learning.py in 100 iterations.
        pulls_to_old: a sample with A = 0 still pulls the policy to the old one, so that the
            gradient is zero only where the two agree. Of the published losses that of DiffusionNFT
            (r = 1/2) and that of CRD (a target of 0) are so.
        ratio: it reports a ratio with the policy of the rollouts.
    """

    algorithm: Algorithm
    learns: dict[str, Algorithm]
    pulls_to_old: bool = False
    ratio: bool = False
    step_each_level: bool = False

    @property
    def reward_part(self) -> Algorithm:
        """The algorithm without its KL term."""
        return changed(self.algorithm, kl=0.0)


def changed(algorithm: Algorithm, **settings: Any) -> Algorithm:
    """With other settings, as far as the algorithm has them."""
    own = {key: value for key, value in settings.items() if key in type(algorithm).model_fields}
    return type(algorithm).model_validate({**algorithm.model_dump(), **own})


# DGPO and Diffusion-DPO: beta is smaller than the published 100, for in two dimensions d - d_ref is
# of the order of one, not 1e-2, and a margin far below zero means a satisfied group whose weight,
# sigmoid(S), is nothing. With beta=100 the mean reward of DGPO stops at -1.8 (from -2.07).
FORWARD: dict[str, Row] = {
    "dgpo": Row(
        DGPO(beta=7, clip=1e-3, kl=0.3),
        {
            "published": DGPO(kl=0.001, beta=3),
            "paper": DGPO(kl=0.001, loss_scale="paper", beta=10),
            "ema": DGPO(kl=0.001, reference="ema", clip=None, beta=2000),
        },
    ),
    "diffusion_nft": Row(
        DiffusionNFT(beta=0.5, kl=0.3),
        {"early": DiffusionNFT(), "late": DiffusionNFT(beta=0.1, old_schedule="late")},
        pulls_to_old=True,
        step_each_level=True,
    ),
    "awm": Row(
        AWM(clip=0.05, kl=0.3, advantage_scale=1.0),
        {"published": AWM(), "plain": AWM(power=1.0, clip=0.2, advantage_scale=1.0)},
        ratio=True,
        step_each_level=True,
    ),
    "diffusion_dpo": Row(DiffusionDPO(beta=7), {"pairs": DiffusionDPO(beta=1)}),
    "crd": Row(
        CRD(kl=0.3),
        {"guided": CRD(kl=0.001), "unguided": CRD(kl=0.001, kl_cfg=1.0)},
        pulls_to_old=True,
    ),
    "rwr": Row(RWR(temperature=0.5), {"warm": RWR(), "cold": RWR(temperature=0.3)}),
    "best_of_n": Row(BestOfN(top_k=2), {"best": BestOfN(), "quarter": BestOfN(top_k=4)}),
}
