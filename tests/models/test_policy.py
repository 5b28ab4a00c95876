"""Which weights answer, that they come back, and that what is saved is what was trained."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from torch import Tensor

from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.recipe.sections import LoraSettings as RecipeLora
from families.tiny import TINY, build, conditioning

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Lora:
    rank: int = 4
    alpha: float = 12  # not the rank: an alpha that is lost shows
    targets: list[str] = field(default_factory=lambda: list(ATTENTION))
    init: str = "gaussian"


class Case:
    """A policy, and one point to evaluate it at."""

    def __init__(self, name: str = "sd3", lora: Any = Lora(), seed: int = 0) -> None:
        self.name = name
        self.model = PipelineModel(build(name), call=TINY[name].call)
        self.cond = conditioning(name, self.model)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        rollout = self.model.rollout(
            self.cond, steps=3, generators=generators, decode=False, record=True
        )
        self.point = rollout.steps[1]
        self.policy = Policy(self.model, lora, seed)
        self.base = self.raw()

    def predict(self, weights: Any = "policy") -> Tensor:
        return self.policy.predict(self.point.sample, self.point.level, self.cond, weights)

    def raw(self) -> Tensor:
        with torch.no_grad():
            return self.model.predict(self.point.sample, self.point.level, self.cond)

    def disturb(self, size: float = 0.05) -> None:
        generator = torch.Generator().manual_seed(3)
        for parameter in self.policy.parameters():
            parameter.data += size * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("lora", [Lora(), Lora(init="default"), None], ids=["gauss", "peft", "all"])
def test_at_the_start_all_weights_answer_alike(lora: Any) -> None:
    case = Case(lora=lora)
    for weights in ("policy", "old", "ref"):
        assert torch.equal(case.predict(weights).detach(), case.base), weights


@pytest.mark.parametrize("name", ["sd3", "sd15", "wan"])
@pytest.mark.parametrize("lora", [Lora(), None], ids=["lora", "all"])
def test_reference_stays_and_old_follows(name: str, lora: Any) -> None:
    case = Case(name, lora)
    case.disturb()
    trained = case.predict().detach()
    assert not torch.allclose(trained, case.base, atol=1e-3)
    assert torch.equal(case.predict("ref"), case.base)
    assert torch.equal(case.predict("old"), case.base)
    case.policy.old.update(0.0)
    torch.testing.assert_close(case.predict("old"), trained, atol=1e-5, rtol=1e-5)
    assert torch.equal(case.predict().detach(), trained)


@pytest.mark.parametrize("lora", [Lora(), None], ids=["lora", "all"])
def test_other_predictions_do_not_disturb_the_gradient(lora: Any) -> None:
    case = Case(lora=lora)
    case.disturb()

    def gradients(between: bool) -> list[Tensor]:
        for parameter in case.policy.parameters():
            parameter.grad = None
        output = case.predict()
        if between:
            assert not case.predict("old").requires_grad
            assert not case.predict("ref").requires_grad
        output.square().mean().backward()
        return [p.grad.clone() for p in case.policy.parameters() if p.grad is not None]

    alone, between = gradients(False), gradients(True)
    assert len(alone) > 0
    assert sum(float(g.abs().sum()) for g in alone) > 0
    assert all(torch.equal(a, b) for a, b in zip(alone, between, strict=True))


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_merged_and_separate_passes_have_the_same_gradients(name: str) -> None:
    case = Case(name)
    case.disturb()

    def gradients() -> list[Tensor]:
        output = case.predict()
        weight = torch.linspace(-1, 1, output.numel()).view_as(output)
        found = torch.autograd.grad((output * weight).sum(), case.policy.parameters())
        return [output.detach(), *found]

    merged = gradients()
    names = {n: id(p) for d in case.model.denoisers.values() for n, p in d.named_parameters()}
    for denoiser in case.model.denoisers.values():
        denoiser.enable_gradient_checkpointing()  # then the LoRA stays apart
    separate = gradients()
    for one, other in zip(merged, separate, strict=True):
        assert (one - other).abs().max() <= 2e-4 * other.abs().max()
    after = {n: id(p) for d in case.model.denoisers.values() for n, p in d.named_parameters()}
    assert names == after


def test_only_the_lora_is_trained_and_it_is_float32() -> None:
    case = Case()
    trained = {id(p) for p in case.policy.parameters()}
    for component in case.model.pipe.components.values():
        if isinstance(component, torch.nn.Module):
            for name, parameter in component.named_parameters():
                assert parameter.requires_grad == (id(parameter) in trained), name
    case.predict("ref")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in case.policy.parameters())


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_rolling_merges_and_restores_bit_for_bit(name: str) -> None:
    case = Case(name)
    case.disturb()
    trained = case.predict().detach()
    denoiser = next(iter(case.model.denoisers.values()))
    before = {k: v.clone() for k, v in denoiser.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), case.policy.rolling():
        torch.testing.assert_close(case.raw(), trained, atol=1e-5, rtol=1e-5)
        assert all(not layer.merged for layer in case.policy.passes.layers)
        assert all(layer.switch.off for layer in case.policy.passes.layers)
        raise RuntimeError("inside")
    after = denoiser.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(case.predict().detach(), trained)
    assert all(p.requires_grad for p in case.policy.parameters())


def test_rolling_with_averages() -> None:
    case = Case()
    case.disturb()
    case.policy.slow.update(0.0)
    trained = case.predict().detach()
    case.disturb()
    with case.policy.rolling("slow"):
        torch.testing.assert_close(case.raw(), trained, atol=1e-5, rtol=1e-5)
    with case.policy.rolling("old"):
        torch.testing.assert_close(case.raw(), case.base, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="'slow'"), case.policy.rolling("fast"):
        pass


def test_half_precision_is_not_merged() -> None:
    pipe = build("sd3").to(torch.bfloat16)
    model = PipelineModel(pipe, call=TINY["sd3"].call)
    cond = conditioning("sd3", model)
    policy = Policy(model, Lora(), 0)
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    xt = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    level = model.rollout(cond, steps=2, decode=False).levels[0]
    for parameter in policy.parameters():
        # far below the spacing of bfloat16 around the base weights: a merge would lose it
        parameter.data += 0.02
    trained = policy.predict(xt, level, cond)
    trained.float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in policy.parameters())
    with policy.rolling(), torch.no_grad():
        assert torch.equal(model.predict(xt, level, cond), trained.detach())


def test_an_unknown_target_names_the_nearest_layers() -> None:
    model = PipelineModel(build("wan"))
    with pytest.raises(UserError) as caught:
        Policy(model, Lora(targets=["to_q", "attn.to_k"]))
    assert "'attn.to_k'" in str(caught.value)
    assert "attn1.to_k" in str(caught.value)
    assert "'to_q'" not in str(caught.value)


def test_the_targets_of_the_recipe_fit_sd3() -> None:
    case = Case(lora=RecipeLora(rank=2, alpha=4))
    adapted = {type(layer).__name__ for layer in case.policy.passes.layers}
    # two blocks of eight projections; the last block has no to_add_out
    assert len(case.policy.passes.layers) == 15
    assert adapted == {"Linear"}


def test_the_seed_decides_the_start_and_nothing_else_moves() -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    a, b, c = (Policy(PipelineModel(build_quietly()), Lora(), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))


def build_quietly() -> Any:
    with torch.random.fork_rng():
        return build("sd3")


@pytest.mark.parametrize("name", ["sd3", "sd15", "wan", "zimage"])
def test_a_saved_lora_is_read_by_a_fresh_pipeline(name: str, tmp_path: Path) -> None:
    case = Case(name)
    case.disturb()
    case.policy.slow.update(0.0)
    trained = case.predict().detach()
    case.disturb()  # the slow average is what is saved
    case.policy.save(tmp_path)
    pipe = build(name)
    pipe.load_lora_weights(tmp_path)
    fresh = PipelineModel(pipe, call=TINY[name].call)
    with torch.no_grad():
        loaded = fresh.predict(case.point.sample, case.point.level, case.cond)
    torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=1e-5)


def test_a_saved_lora_names_its_targets_in_one_order(tmp_path: Path) -> None:
    targets = ["attn.to_v", "attn.to_q", "attn.to_out.0", "attn.to_k", "attn.add_q_proj"]
    model = PipelineModel(build("sd3"), call=TINY["sd3"].call)
    Policy(model, RecipeLora(rank=2, alpha=6, targets=targets)).save(tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert said["transformer.target_modules"] == sorted(targets)
    assert (said["transformer.r"], said["transformer.lora_alpha"]) == (2, 6)


def test_a_saved_denoiser_is_read_by_its_class(tmp_path: Path) -> None:
    case = Case(lora=None)
    case.disturb(0.01)
    trained = case.predict().detach()
    case.policy.save(tmp_path, weights="policy")
    pipe = build("sd3")
    pipe.register_modules(
        transformer=SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    )
    fresh = PipelineModel(pipe, call=TINY["sd3"].call)
    with torch.no_grad():
        loaded = fresh.predict(case.point.sample, case.point.level, case.cond)
    assert torch.equal(loaded, trained)


def test_the_state_is_what_predicts() -> None:
    source, target = Case(), Case(seed=5)
    source.disturb()
    source.policy.old.update(0.5)
    source.policy.slow.update(0.9)
    state = {k: v.clone() for k, v in source.policy.state_dict().items()}
    for name, tensor in target.policy.state_dict().items():
        tensor.copy_(state[name])
    for weights in ("policy", "old"):
        assert torch.equal(source.predict(weights), target.predict(weights))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    target.policy.refuse_other(shapes)
    with pytest.raises(UserError, match="lora"):
        Case(lora=Lora(rank=2)).policy.refuse_other(shapes)
