"""No family needs ``lora.targets``: what ``auto`` finds learns, and is read back when saved."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from dgpo.check.examination import check_rows
from dgpo.models.loras import load_lora
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.probes import Step
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.policy import Policy
from dgpo.recipe.sections import LoraSettings
from families.tiny import TINY, tiny_model

FAMILIES = [
    pytest.param(name, marks=() if tiny.fast else pytest.mark.slow)
    for name, tiny in TINY.items()
    if tiny.refused is None
]
REACHED = 0.8
"""The smallest share of layers that learn. Nothing reads what a last block makes of the text, and
the tiny denoisers have a block or two."""


def outputs(model: PipelineModel, steps: list[Step], cond: Conditioning) -> list[Tensor]:
    with torch.no_grad():
        return [model.predict(step.sample, step.level, cond) for step in steps]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_without_a_layer_being_named(name: str, tmp_path: Path) -> None:
    tiny, model = TINY[name], tiny_model(name)
    encode = functools.partial(model.encode, guidance=True)
    rows = check_rows(tiny.picture and tiny.picture(), tiny.mask and tiny.mask())
    cond = encode([row.text for row in rows])
    generators = [torch.Generator().manual_seed(row) for row in range(cond.size)]
    steps = model.rollout(cond, steps=3, generators=generators, decode=False, record=True).steps

    policy = Policy(model, LoraSettings(rank=2, alpha=4))
    assert policy.targets and policy.news
    for step in steps:  # of all, so that every expert is asked
        policy.predict(step.sample, step.level, cond).float().square().mean().backward()
    layers = [
        module
        for denoiser in model.denoisers.values()
        for module in denoiser.modules()
        if isinstance(module, LoraLayer)
    ]
    # B is zero at the start, so that A learns from the second step on
    learned = [layer.lora_B["default"].weight.grad for layer in layers]
    reached = sum(gradient is not None and bool(gradient.any()) for gradient in learned)
    print(f"{name}: {reached} of {len(layers)} layers, {', '.join(policy.targets)}")
    assert reached >= REACHED * len(layers) > 0

    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    trained = outputs(model, steps, cond)
    with policy.reference():
        base = outputs(model, steps, cond)
    policy.save(tmp_path, "policy")
    fresh = tiny_model(name)
    load_lora(fresh.pipe, tmp_path)
    for read, was, before in zip(outputs(fresh, steps, cond), trained, base, strict=True):
        assert (read - was).abs().max() <= 1e-4 * (was - before).abs().max()
