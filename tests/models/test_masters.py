"""All weights trained in half precision: passes round, the optimiser and the averages do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.training.updater import Updater
from families.tiny import TINY, build, conditioning


class Case:
    """A policy of which all weights are trained, and a point to evaluate it at."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model = PipelineModel(build("sd3").to(dtype), call=TINY["sd3"].call)
        self.denoiser: Any = next(iter(self.model.denoisers.values()))
        self.cond = conditioning("sd3", self.model)
        self.level = self.model.rollout(self.cond, steps=2, decode=False).levels[0]
        self.xt = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        self.base = self.raw()
        self.policy = Policy(self.model, None)
        self.masters = self.policy.parameters()
        self.weights = [*self.denoiser.parameters()]

    def raw(self) -> Tensor:
        """What the denoiser answers as it is."""
        with torch.no_grad():
            return self.model.predict(self.xt, self.level, self.cond)

    def predict(self, weights: Any = "policy") -> Tensor:
        return self.policy.predict(self.xt, self.level, self.cond, weights)

    def disturb(self) -> None:
        generator = torch.Generator().manual_seed(3)
        for master in self.masters:
            master.data += 0.02 * torch.randn(master.shape, generator=generator)

    def gradients(self, *losses: Tensor) -> list[Tensor]:
        for master in self.masters:
            master.grad = None
        for loss in losses:
            loss.backward()
        found = [master.grad for master in self.masters if master.grad is not None]
        assert all(gradient.dtype == torch.float32 for gradient in found)
        assert all(weight.grad is None for weight in self.weights if weight.dtype.itemsize < 4)
        return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_begin_as_the_weights(dtype: torch.dtype) -> None:
    case = Case(dtype)
    state = case.policy.state_dict()
    assert len(state) == 3 * len(case.weights)
    assert all(tensor.dtype == torch.float32 for tensor in (*case.masters, *state.values()))
    assert all(weight.dtype == dtype for weight in case.weights)
    for weights in ("policy", "old", "ref"):
        assert torch.equal(case.predict(weights).detach(), case.base), weights


def test_float32_has_no_copies() -> None:
    case = Case(torch.float32)
    assert [*map(id, case.masters)] == [*map(id, case.weights)]


def test_steps_smaller_than_the_rounding_add_up() -> None:
    case = Case()
    index, master = max(
        enumerate(case.masters), key=lambda pair: float(pair[1].detach().abs().max())
    )
    place = int(master.abs().argmax())
    before = float(master.view(-1)[place])
    step = abs(before) * 2**-10  # a quarter of the spacing of bfloat16, or less
    assert float(torch.tensor(before + step).bfloat16()) == before
    for taken in range(1, 9):
        master.data.view(-1)[place] += step
        case.predict()
        assert float(case.weights[index].view(-1)[place]) == float(
            torch.tensor(before + taken * step).bfloat16()
        )
    assert float(case.weights[index].view(-1)[place]) != before


def test_gradients_of_passes_add_up_in_float32() -> None:
    case = Case()
    case.disturb()
    outputs = [case.predict() for _ in range(3)]
    losses = [output.float().pow(n + 2).mean() for n, output in enumerate(outputs)]
    wanted = [
        torch.autograd.grad(loss, case.weights, retain_graph=True, allow_unused=True)
        for loss in losses
    ]
    sums = [
        sum(gradient.float() for gradient in each if gradient is not None)
        for each in zip(*wanted, strict=True)
        if each[0] is not None
    ]
    for found, summed in zip(case.gradients(*losses), sums, strict=True):
        assert torch.equal(found, torch.as_tensor(summed))


def test_gradients_are_those_of_float32_up_to_rounding() -> None:
    narrow, wide = Case(), Case(torch.float32)
    for master, weight in zip(narrow.masters, wide.masters, strict=True):
        weight.data.copy_(master)
    found, exact = (c.gradients(c.predict().float().square().mean()) for c in (narrow, wide))
    off = sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True)) ** 0.5
    assert off < 0.02 * sum(float(b.square().sum()) for b in exact) ** 0.5


def test_other_weights_in_between_do_not_disturb_the_gradient() -> None:
    case = Case()
    case.disturb()
    alone = case.gradients(case.predict().float().square().mean())
    output = case.predict()
    assert not torch.equal(output, case.base)
    assert torch.equal(case.predict("ref"), case.base)
    assert torch.equal(case.predict("old"), case.base)
    between = case.gradients(output.float().square().mean())
    assert all(map(torch.equal, alone, between))
    case.denoiser.enable_gradient_checkpointing()  # blocks run again, with the weights in place
    again = case.gradients(case.predict().float().square().mean())
    assert all(map(torch.equal, alone, again))


def test_rollouts_and_what_is_saved_compute_with_the_rounded_average(tmp_path: Path) -> None:
    case = Case()
    case.disturb()
    case.policy.slow.update(0.25)
    case.policy.save(tmp_path)
    with case.policy.rolling("slow"):
        averaged = case.raw()
    with case.policy.rolling():
        trained = case.raw()
    assert torch.equal(case.predict().detach(), trained)
    assert not torch.equal(trained, averaged)
    saved = SD3Transformer2DModel.from_pretrained(
        tmp_path / "transformer", torch_dtype=torch.bfloat16
    )
    case.model.pipe.register_modules(transformer=saved)
    fresh = PipelineModel(case.model.pipe, call=TINY["sd3"].call)
    with torch.no_grad():
        assert torch.equal(fresh.predict(case.xt, case.level, case.cond), averaged)


def test_a_step_moves_masters_and_averages_in_float32() -> None:
    from dgpo.recipe import Recipe
    from tiny_runs import settings

    case = Case()
    recipe = Recipe.from_dict(settings(lora=None, precision="bfloat16", train={"lr": 1e-7}))
    updater = Updater(case.policy, recipe)
    before = [master.detach().clone() for master in case.masters]
    case.gradients(case.predict().float().square().mean())
    updater.optimizer.step()
    moved = [float((a - b).abs().max()) for a, b in zip(before, case.masters, strict=True)]
    assert 0 < max(moved) < 1e-6
    case.policy.slow.update(0.5)
    for old, now, slow in zip(before, case.masters, case.policy.slow.tensors, strict=True):
        torch.testing.assert_close(slow, (old + now) / 2, rtol=0, atol=1e-9)


def test_weights_in_8_bits_are_refused() -> None:
    pipe = build("sd3")
    model = PipelineModel(pipe, call=TINY["sd3"].call)
    pipe.transformer.to(torch.float8_e4m3fn)
    with pytest.raises(UserError, match=r"lora: null.*float8_e4m3fn.*bfloat16"):
        Policy(model, None)
