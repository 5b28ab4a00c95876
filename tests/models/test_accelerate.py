"""Inexact rollouts: what they skip or round, that nothing of it stays, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgpo.errors import UserError
from dgpo.models.accelerate import _KEY, Accelerated, _fp8, _int8, distance
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.models.weights import compute
from dgpo.recipe import Recipe
from dgpo.recipe.sections import AccelerateSettings, LoraSettings
from families.tiny import TINY, build, conditioning

STEPS = 6
TAYLOR: dict[str, Any] = {"cache": "taylorseer"}
FASTER: dict[str, Any] = {"cache": "fastercache"}
FIRST: dict[str, Any] = {"cache": "first_block", "cache_options": {"threshold": 1e9}}


class Case:
    """A policy whose LoRA has moved."""

    def __init__(self, name: str = "sd3", dtype: torch.dtype = torch.float32, **lora: Any) -> None:
        self.model = PipelineModel(build(name).to(dtype), call=TINY[name].call)
        self.cond = conditioning(name, self.model)
        self.policy = Policy(self.model, LoraSettings(**{"rank": 2, "alpha": 6, **lora}))
        generator = torch.Generator().manual_seed(3)
        for parameter in self.policy.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)

    def rolling(self, **given: Any) -> Any:
        return Accelerated(self.policy, AccelerateSettings(**given)).rolling()

    def sample(self, guidance_scale: float = 1.0) -> Tensor:
        return self.model.rollout(
            self.cond,
            steps=STEPS,
            guidance_scale=guidance_scale,
            generators=[torch.Generator().manual_seed(row) for row in range(2)],
            decode=False,
        ).x0

    def exact(self) -> Tensor:
        with self.policy.rolling():
            return self.sample()

    def state(self) -> list[Any]:
        """What a module of the denoiser has of its own, and the bits of its weights."""
        (denoiser,) = self.model.denoisers.values()
        weights = [weight.detach().clone() for weight in denoiser.parameters()]
        compiled = [module._compiled_call_impl for module in denoiser.modules()]
        own = [sorted(vars(module)) for module in denoiser.modules()]
        return [own, compiled, self.model.sampling, weights]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compute, "BACKEND", "eager")
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("fails", [False, True], ids=["done", "cut off"])
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("sd3", TAYLOR),
        ("sd3", FASTER),
        ("flux", FIRST),
        ("sd3", {"precision": "int8"}),
        pytest.param("sd3", {"compile": True}, marks=pytest.mark.slow),
    ],
)
def test_nothing_stays_after_rollouts(name: str, setting: Any, fails: bool) -> None:
    case = Case(name)
    lossy = Accelerated(case.policy, AccelerateSettings(**setting))
    exact, before = case.exact(), case.state()
    levels = case.model.rollout(case.cond, steps=2, decode=False).levels
    predicted = case.policy.predict(exact, levels[0], case.cond)
    made = exact
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), lossy.rolling():
        made = case.sample()
        assert not torch.equal(made, exact) or "compile" in setting
        (denoiser,) = case.model.denoisers.values()
        hook = denoiser.register_forward_hook(lambda *_: 1 / 0) if fails else None
        try:
            case.sample()
        finally:
            if hook is not None:
                hook.remove()
    after = case.state()
    assert before[:3] == after[:3]
    assert all(map(torch.equal, before[3], after[3]))
    assert torch.equal(case.policy.predict(exact, levels[0], case.cond), predicted)
    assert torch.equal(case.exact(), exact)
    with lossy.rolling():  # and it works again
        assert torch.equal(case.sample(), made)


def asked(module: nn.Module, case: Case, **setting: Any) -> int:
    """How often a module computes in a rollout of ``STEPS`` steps."""
    case.sample()  # a model's first call tries how its pipeline wants to be called
    calls: list[Any] = []
    kept = module.forward
    module.forward = lambda *args, **named: calls.append(1) or kept(*args, **named)
    with case.rolling(**setting):
        case.sample()
    del module.forward
    return len(calls)


def test_what_a_cache_leaves_out() -> None:
    sd3, flux = Case(), Case("flux")
    attention = sd3.model.denoisers["transformer"].get_submodule("transformer_blocks.0.attn")
    assert asked(attention, sd3, steps=2) == STEPS  # the caller gives the steps
    # exact before the third step, at the fifth, and then every fifth
    assert asked(attention, sd3, **TAYLOR) == 4
    assert asked(attention, sd3, **TAYLOR, cache_options={"cache_interval": 1}) == STEPS
    assert asked(attention, sd3, **FASTER) < STEPS
    blocks = flux.model.denoisers["transformer"].get_submodule("single_transformer_blocks")
    last = [*blocks.children()][-1]
    assert asked(last, flux, **FIRST) == 1
    assert asked(last, flux, **FIRST | {"cache_options": {"threshold": 0.0}}) == STEPS


def test_a_merged_lora_is_rounded_as_its_base() -> None:
    case = Case(dtype=torch.bfloat16)
    layer = case.policy.passes.layers[0]
    base = layer.get_base_layer().weight
    wanted = base + layer.get_delta_weight("default").to(torch.bfloat16)
    with case.rolling(precision="merged"):
        assert torch.equal(base, wanted) and not torch.equal(base, wanted - 1)
        merged = case.sample()
    assert not torch.equal(base, wanted)
    assert 0 < distance(merged, case.exact()) < 0.5


def test_8_bits_of_a_base_in_half_precision_merge_the_lora() -> None:
    case = Case(dtype=torch.bfloat16)
    with case.rolling(precision="merged"):
        merged = case.sample()
    with case.rolling(precision="int8"):
        assert 0 < distance(case.sample(), merged) < 0.5


@pytest.mark.parametrize("rows", [5, 64])
def test_products_in_8_bits(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 32)
    x = torch.randn(2, rows, 64, generator=generator)
    x[0, 0] *= 100  # a row of its own scale
    exact, made = layer(x).detach(), _int8(layer)(x).detach()
    error = (made - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert made.dtype == x.dtype and float(error.mean()) > 1e-4 and float(error.max()) < 0.03
    assert torch.equal(_int8(layer)(x[1:, :3]), made[1:, :3])  # whoever shares the batch
    assert callable(_fp8(layer))


def test_distance_is_in_spreads_of_the_group() -> None:
    generator = torch.Generator().manual_seed(0)
    exact, other = torch.randn(2, 64, 3, 8, generator=generator)
    assert distance(exact, exact) == 0
    assert distance(5 + 3 * other, 5 + 3 * exact) == pytest.approx(2**0.5, rel=0.03)


@pytest.mark.parametrize(
    ("name", "setting", "said"),
    [
        ("sd3", FIRST, "cache = 'first_block': SD3Transformer2DModel failed with it: TypeError"),
        ("sd15", TAYLOR, "it finds nothing in UNet2DConditionModel; use null"),
        ("sd15", FIRST, "UNet2DConditionModel failed with it: IndexError"),
        (
            "sd3",
            {**TAYLOR, "cache_options": {"intervall": 2}},
            "use fields of diffusers.TaylorSeer",
        ),
        ("sd3", {"precision": "fp8"}, "the denoiser is on cpu; use int8, or null"),
        ("sd3", {"precision": "merged"}, "into float32 weights anyway, exactly; use null"),
    ],
)
def test_what_a_model_cannot_do_is_refused(name: str, setting: Any, said: str) -> None:
    case = Case(name, targets="auto")
    before = case.state()
    with pytest.raises(UserError, match=f"{_KEY}.*{said}"):
        Accelerated(case.policy, AccelerateSettings(**setting)).trial(case_sample(case))
    assert before[:3] == case.state()[:3]


def case_sample(case: Case) -> Any:
    return lambda: case.model.rollout(case.cond, steps=STEPS, decode=False, record=True)


def test_a_cache_that_would_mix_the_halves_of_guidance_is_refused() -> None:
    case = Case("flux")

    def guided() -> Any:
        return case.model.rollout(
            case.cond, steps=STEPS, guidance_scale=3.0, decode=False, record=True
        )

    Accelerated(case.policy, AccelerateSettings(**FIRST)).trial(guided)
    with pytest.raises(UserError, match="12 times in 6 steps, which this cache would mix"):
        Accelerated(case.policy, AccelerateSettings(**FASTER)).trial(guided)


@pytest.mark.parametrize(
    ("setting", "others", "said"),
    [
        ({}, {}, "it changes nothing"),
        ({"steps": 10}, {}, "rollout.steps = 10; use fewer, or null"),
        ({"cache_options": {"a": 1}, "steps": 2}, {}, "there is no cache"),
        ({"compile": True, "precision": "int8"}, {}, "not with a cache, int8 or fp8"),
        (
            {"precision": "int8"},
            {"memory": {"quantization": "torchao_int8"}},
            "memory.quantization",
        ),
        (TAYLOR, {"compute": {"compile": "blocks"}}, "compute.compile = 'blocks'"),
        ({"steps": 2}, {"train": {"sharding": "fsdp2"}}, "train.sharding = 'fsdp2'"),
        ({"steps": 2}, {"algorithm": "flow_grpo"}, "flow_grpo compares likelihoods of the steps"),
        ({"steps": 2}, {"algorithm": "ddpo"}, "an algorithm that needs none, such as dgpo"),
        ({"steps": 2}, {"algorithm": "grpo_guard"}, "use null"),
        ({"steps": 2}, {"algorithm": "flow_dppo"}, "whose likelihood it computes"),
    ],
)
def test_recipes_that_contradict_it(setting: Any, others: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Recipe.from_dict({"rollout": {"accelerate": setting}, **others})
