"""One algorithm, one file. An algorithm is its validated settings and its four decisions: which
points it trains on, which snapshots it needs, how rewards become advantages, and the loss."""

from dgpo.algorithms.awm import AWM
from dgpo.algorithms.base import Algorithm, Settings
from dgpo.algorithms.best_of_n import BestOfN
from dgpo.algorithms.crd import CRD
from dgpo.algorithms.dgpo import DGPO
from dgpo.algorithms.diffusion_dpo import DiffusionDPO
from dgpo.algorithms.diffusion_nft import DiffusionNFT
from dgpo.algorithms.rwr import RWR

__all__ = [
    "AWM",
    "CRD",
    "DGPO",
    "RWR",
    "Algorithm",
    "BestOfN",
    "DiffusionDPO",
    "DiffusionNFT",
    "Settings",
]
