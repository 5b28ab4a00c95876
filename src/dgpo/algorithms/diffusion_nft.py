"""DiffusionNFT is negative-aware fine-tuning on the forward process (arXiv 2509.16117).

The policy's prediction v stands for two others, one that is told what is good and one that is told
what is bad. Their clean samples x0(.) are fitted in proportion to a probability of being good:
    v+ = b v + (1-b) v_old,    v- = (1+b) v_old - b v                                       (1)
    L+- = mean (x0(v+-) - x0)^2 / sg[max(mean |x0(v+-) - x0|, 1e-5)]                        (2)
    loss = (m/b) mean_i[r_i L+_i + (1-r_i) L-_i],    r = A/(2m) + 1/2,  |A| <= m            (3)
At v = v_old the gradient of (3) is mean_i A_i grad L_i, where L is (2) of v itself. Elsewhere a
sample with A = 0 has an effect too: with r = 1/2 it pulls v back to v_old.

(2) compares clean samples, not velocities, so that (1) to (3) hold for any noising process.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dgpo.algorithms.base import Algorithm, SnapshotName
from dgpo.algorithms.contract import Contract
from dgpo.algorithms.shared import NormalizedRewards
from dgpo.core.points import Forward
from dgpo.core.precision import mean_square, widen_pair


def implicit_predictions(out: Tensor, old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return v+ and v- of (1), ``[B, ...]`` in full precision; gradients flow through ``out``."""
    out, old = widen_pair(out, old.detach(), "the predictions of the policy and of the old policy")
    return beta * out + (1 - beta) * old, (1 + beta) * old - beta * out


def scaled_error(clean: Tensor, x0: Tensor) -> Tensor:
    """Return (2), the squared over the detached absolute error: two ``[B, ...]`` to ``[B]``."""
    clean, x0 = widen_pair(clean, x0, "the predicted and the true clean samples")
    scale = (clean.detach() - x0).abs().flatten(1).mean(1).clamp(min=1e-5)
    return mean_square(clean, x0) / scale


class DiffusionNFT(NormalizedRewards, Algorithm):
    """DiffusionNFT trains on pictures of the old policy, which moves once an iteration.

    Differs from the paper: the noise levels are those of ``timesteps`` and one noise serves a
    group, as for every algorithm here; the published runs train all levels of the schedule.

    >>> algorithm = DiffusionNFT(old_schedule="late")
    >>> algorithm.samples_from, sorted(algorithm.snapshots)
    ('old', ['old', 'ref'])
    >>> [algorithm.old_decay(iteration) for iteration in (0, 36, 37, 1000)]
    [0.0, 0.0, 0.0075, 0.999]
    """

    name: ClassVar[str] = "diffusion_nft"
    contract: ClassVar[Contract] = Contract(
        terms={"beta": 0.5, "kl": 0.3},
        learns={"early": {}, "late": {"beta": 0.1, "old_schedule": "late"}},
        pulls_to_old=True,  # r = 1/2
        each_level=True,
    )
    old_moves: ClassVar[Literal["step", "iteration"]] = "iteration"
    samples_from: ClassVar[Literal["policy", "old"]] = "old"
    beta: float = Field(default=1.0, gt=0)
    """How far v+ and v- lie from the old prediction; small values move the policy further.
    Published: 1 (GenEval, PickScore) and 0.1 (OCR, several rewards)."""
    kl: float = Field(default=1e-4, ge=0)
    """The weight of mean (v - v_ref)^2 with the frozen reference."""
    advantage_max: float = Field(default=5.0, gt=0)
    """The m of (3), the largest absolute value of an advantage; at m a sample is certainly good."""
    old_schedule: Literal["early", "late"] = "early"
    """The decay of the old policy after iteration n. early: min(0.001 n, 0.5), published for
    GenEval and PickScore; late: min(0.0075 max(k - 75, 0), 0.999) with k = 2 (n + 1), published for
    OCR, where k counts the gradient steps, two an iteration."""

    @property
    def snapshots(self) -> frozenset[SnapshotName]:
        return frozenset(("old", "ref") if self.kl > 0 else ("old",))

    def loss(self, points: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        good, bad = implicit_predictions(points.pred, points.snapshot("old"), self.beta)
        positive = scaled_error(points.clean(good), points.x0)
        negative = scaled_error(points.clean(bad), points.x0)
        chance = points.advantages.to(positive) / (2 * self.advantage_max) + 0.5
        loss = (chance * positive + (1 - chance) * negative).mean() * self.advantage_max / self.beta
        error = points.error(points.pred)
        metrics = {"error": error, "positive": positive, "negative": negative}
        if self.kl > 0:
            metrics["kl"] = mean_square(points.pred, points.snapshot("ref").detach())
            loss = loss + self.kl * metrics["kl"].mean()
        return loss, {name: value.detach().mean() for name, value in metrics.items()}

    def old_decay(self, step: int) -> float:
        if self.old_schedule == "early":
            return min(0.001 * step, 0.5)
        return min(0.0075 * max(2 * (step + 1) - 75, 0), 0.999)
