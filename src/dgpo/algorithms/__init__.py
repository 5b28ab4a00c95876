"""One algorithm, one file. An algorithm is its validated settings and its four decisions: which
points it trains on, which snapshots it needs, how rewards become advantages, and the loss."""

from dgpo.algorithms.awm import AWM
from dgpo.algorithms.base import Algorithm, BaseAlgorithm, TrajectoryAlgorithm
from dgpo.algorithms.best_of_n import BestOfN
from dgpo.algorithms.crd import CRD
from dgpo.algorithms.ddpo import DDPO
from dgpo.algorithms.dgpo import DGPO
from dgpo.algorithms.diffusion_dpo import DiffusionDPO
from dgpo.algorithms.diffusion_nft import DiffusionNFT
from dgpo.algorithms.flow_dppo import FlowDPPO
from dgpo.algorithms.flow_grpo import FlowGRPO
from dgpo.algorithms.grpo_guard import GRPOGuard
from dgpo.algorithms.rwr import RWR

__all__ = [
    "AWM",
    "CRD",
    "DDPO",
    "DGPO",
    "RWR",
    "Algorithm",
    "BaseAlgorithm",
    "BestOfN",
    "DiffusionDPO",
    "DiffusionNFT",
    "FlowDPPO",
    "FlowGRPO",
    "GRPOGuard",
    "TrajectoryAlgorithm",
]
