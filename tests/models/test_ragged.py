"""Prompts of different length, for a pipeline that takes no mask: calls of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dgpo.core.sde import FlowSDE
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.samplers.sde_schedulers import make_sde_scheduler, with_noise
from dgpo.rewards.shipped.stand_in import brightness
from dgpo.trainer import Trainer
from families.tiny import build, tiny_model
from tiny_runs import settings

SHORT, OTHER = "a cat", "red dog"
LONG = "a photo of the red dog on the small blue house on the big table of the cat of the dog"


@pytest.fixture(scope="module")
def model() -> PipelineModel:
    return tiny_model("cogview4")


def samples(model: PipelineModel, prompts: list[str], rows: list[int], **how: Any) -> Any:
    cond = model.encode(prompts, guidance=True)
    generators = [torch.Generator().manual_seed(row) for row in rows]
    return model.rollout(cond, steps=3, generators=generators, record=True, **how)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_row_is_what_it_is_in_a_batch_of_its_own_length(
    model: PipelineModel, scale: float
) -> None:
    mixed = samples(model, [SHORT, LONG, OTHER], [0, 1, 2], guidance_scale=scale)
    short = samples(model, [SHORT, OTHER], [0, 2], guidance_scale=scale)
    long = samples(model, [LONG], [1], guidance_scale=scale)
    assert torch.equal(mixed.x0, torch.stack([short.x0[0], long.x0[0], short.x0[1]]))
    pixels = [image.tobytes() for image in mixed.images]
    apart = [short.images[0], long.images[0], short.images[1]]
    assert pixels == [image.tobytes() for image in apart] and len(set(pixels)) == 3
    cond = model.encode([SHORT, LONG, OTHER], guidance=True)
    with torch.no_grad():
        for step in mixed.steps:
            again = model.predict(step.sample, step.level, cond, scale)
            assert torch.equal(again, step.output)


def test_noise_follows_its_row(model: PipelineModel) -> None:
    sampler = make_sde_scheduler(FlowSDE(), model.pipe.scheduler)
    mixed = samples(
        model, [SHORT, LONG, OTHER], [0, 1, 2], scheduler=with_noise(sampler, range(2), [7, 8, 9])
    )
    long = samples(model, [LONG], [1], scheduler=with_noise(sampler, range(2), [8]))
    assert torch.equal(mixed.x0[1:2], long.x0)


def test_gradients_reach_every_row(model: PipelineModel) -> None:
    made = samples(model, [SHORT, LONG], [0, 1], decode=False)
    xt = made.steps[1].sample.clone().requires_grad_(True)
    cond = model.encode([SHORT, LONG], guidance=True)
    model.predict(xt, made.steps[1].level, cond).square().sum().backward()
    assert xt.grad is not None
    assert all(bool(row.abs().max() > 0) for row in xt.grad)


def test_a_run_trains_on_prompts_of_any_length(tmp_path: Path) -> None:
    recipe = settings(
        rollout={"call": {"height": 32, "width": 32}},
        lora={"targets": ["to_q", "to_v"]},
        run={"dir": str(tmp_path / "run")},
    )
    trainer = Trainer(build("cogview4"), brightness, [SHORT, LONG], [LONG, SHORT], recipe=recipe)
    before = [parameter.detach().clone() for parameter in trainer.policy.parameters()]
    trainer.train()
    after = trainer.policy.parameters()
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Another:
    """A run of two processes, the other of which makes so many calls."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def all_gather_object(self, value: int, what: str) -> list[int]:
        return [value, self.calls]


@pytest.mark.parametrize("prompts", [[SHORT, OTHER], [SHORT, LONG]])
def test_dummy_passes_change_nothing(
    model: PipelineModel, monkeypatch: pytest.MonkeyPatch, prompts: list[str]
) -> None:
    """Beside a process that makes three calls, of pieces of the weights, this one does, too."""
    cond = model.encode(prompts, guidance=True)

    def gradient() -> tuple[torch.Tensor, torch.Tensor]:
        xt = made.steps[1].sample.clone().requires_grad_(True)
        out = model.predict(xt, made.steps[1].level, cond)
        out.square().sum().backward()
        assert xt.grad is not None
        return out.detach(), xt.grad

    made = samples(model, prompts, [0, 1])
    alone = gradient()
    (denoiser,) = model.denoisers.values()
    passes = []
    hook = denoiser.register_forward_hook(lambda *_: passes.append("forward"))
    back = denoiser.register_full_backward_hook(lambda *_: passes.append("backward"))
    monkeypatch.setattr(model, "_processes", Another(3))
    try:
        beside = samples(model, prompts, [0, 1])
        assert passes == 3 * 3 * ["forward"]
        passes.clear()
        together = gradient()
        assert passes == 3 * ["forward"] + 3 * ["backward"]
    finally:
        hook.remove()
        back.remove()
    assert torch.equal(beside.x0, made.x0) and len(beside.images or []) == 2
    assert all(map(torch.equal, together, alone))
