"""The LoRA in the precision of its base: near the truth, never stale, and off for the reference."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.models.weights.lora import ADAPTER
from dgpo.models.weights.lora_passes import LoraPasses, rounded, widened
from dgpo.recipe.sections import LoraSettings
from families.tiny import TINY, build, conditioning

NARROW = [torch.bfloat16, torch.float16]
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""The largest relative error of one rounding."""


class Net(nn.Module):
    """A linear layer and a convolution, each of which gets a LoRA."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(24, 40), nn.Conv2d(3, 5, 3, padding=1)
        self.to(dtype)

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        return [self.linear(x), self.conv(y)]


def adapted(dtype: torch.dtype, compiled: bool = False) -> tuple[Any, LoraPasses, list[Tensor]]:
    """A net with a LoRA that has moved, its passes, and an input of each layer."""
    torch.manual_seed(0)
    net = Net(dtype).requires_grad_(False)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["linear", "conv"])
    peft.inject_adapter_in_model(config, net, ADAPTER)
    layers: list[Any] = [net.linear, net.conv]
    for layer in layers:
        for half in (layer.lora_A, layer.lora_B):
            half[ADAPTER].float().requires_grad_(True)
            nn.init.normal_(half[ADAPTER].weight, std=0.3)
    passes = LoraPasses(layers, compiled)
    return net, passes, [torch.randn(2, 7, 24).to(dtype), torch.randn(2, 3, 6, 6).to(dtype)]


def exact(net: Net, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What the net answers in float64, and the gradients of the LoRA for a fixed loss."""
    wide: Any = copy.deepcopy(net).double()
    for layer in (wide.linear, wide.conv):
        vars(layer)["narrow"] = None  # peft's own formula
    answers = wide(*(one.double() for one in inputs))
    return answers, list(torch.autograd.grad(loss(answers), LoraPasses(layers_of(wide)).weights))


def layers_of(net: Any) -> list[Any]:
    return [net.linear, net.conv]


def loss(answers: list[Tensor]) -> Tensor:
    made = answers[0].new_zeros(())
    for one in answers:
        weight = torch.linspace(-1, 1, one.numel(), dtype=torch.float64).view_as(one)
        made = made + (one * weight.to(one.dtype)).sum()
    return made


def off(one: Tensor, other: Tensor) -> float:
    return float(((one.double() - other).norm() / other.norm()).detach())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("ahead", [True, False], ids=["cast ahead", "cast in the layer"])
def test_answers_and_gradients_are_within_a_few_roundings_of_float64(
    dtype: torch.dtype, ahead: bool
) -> None:
    net, passes, inputs = adapted(dtype)
    truth, gradients = exact(net, inputs)
    if ahead:
        with passes.cast(passes.weights, gradients=True):
            answers = net(*inputs)
    else:
        answers = net(*inputs)
    # roundings: of A, of B, of A x, of W x and of the sum
    for one, other in zip(answers, truth, strict=True):
        assert one.dtype == dtype and off(one, other) <= 3 * EPS[dtype]
    found = torch.autograd.grad(loss(answers), passes.weights)
    for one, other in zip(found, gradients, strict=True):
        assert one.dtype == torch.float32 and off(one, other) <= 4 * EPS[dtype]


def test_casts_ahead_and_in_the_layer_are_the_same_bits() -> None:
    net, passes, inputs = adapted(torch.bfloat16)
    within = net(*inputs)
    with passes.cast(passes.weights, gradients=True):
        ahead = net(*inputs)
    assert all(map(torch.equal, ahead, within))


def test_gradients_add_up_in_float32_and_a_layer_that_is_not_asked_gets_none() -> None:
    net, passes, (x, _) = adapted(torch.bfloat16)
    for _ in range(3):
        with passes.cast(passes.weights, gradients=True):
            answer = net.linear(x)
        loss([answer]).backward()
    a, b, *others = (weight.grad for weight in passes.weights)
    assert all(one is None for one in others)
    for one, half in ((a, net.linear.lora_A), (b, net.linear.lora_B)):
        assert one is not None and one.dtype == half[ADAPTER].weight.dtype == torch.float32
        with passes.cast(passes.weights, gradients=True):
            answer = net.linear(x)
        (single,) = torch.autograd.grad(loss([answer]), half[ADAPTER].weight)
        torch.testing.assert_close(one, single + single + single, rtol=0, atol=0)


def test_weights_are_cast_anew_however_they_have_moved() -> None:
    net, passes, inputs = adapted(torch.bfloat16)

    def answer() -> list[Tensor]:
        with torch.no_grad(), passes.cast(passes.weights):
            return net(*inputs)

    before = answer()
    for weight in passes.weights:
        weight.data += 0.5  # moves no version counter
    assert not any(map(torch.equal, before, answer()))
    with torch.no_grad(), passes.cast([torch.zeros_like(one) for one in passes.weights]):
        assert torch.equal(net.linear(inputs[0]), net.linear.base_layer(inputs[0]))


@pytest.mark.parametrize("compiled", [False, True], ids=["skipped", "chosen by a tensor"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_reference_is_the_base_bit_for_bit_whatever_the_lora_makes(
    dtype: torch.dtype, compiled: bool
) -> None:
    net, passes, inputs = adapted(dtype, compiled)
    assert passes.gated == compiled
    for layer in layers_of(net):  # positive numbers become -0
        layer.base_layer.register_forward_hook(
            lambda layer, given, made: torch.where(made > 0, -0.0, made)
        )
    with torch.no_grad():
        for weight in passes.weights:
            weight.fill_(float(torch.finfo(dtype).max) / 4)
        base = [layer.base_layer(one) for layer, one in zip(layers_of(net), inputs, strict=True)]
        with passes.reference():
            found = net(*inputs)
        assert not torch.isfinite(net.linear(inputs[0])).all()
    for one, other in zip(found, base, strict=True):
        assert (other.view(torch.int16) == -(2**15)).any()
        assert torch.equal(one.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_lora_of_zero_is_the_base_for_every_form_of_input(compiled: bool) -> None:
    net, passes, (x, _) = adapted(torch.bfloat16, compiled)
    nn.init.zeros_(net.linear.lora_B[ADAPTER].weight)
    slices, wide = torch.randn(3, 9, 24).bfloat16()[:, 2:], torch.randn(2, 3, 5, 24).bfloat16()
    assert passes.gated == compiled and not slices.is_contiguous()
    with torch.no_grad():
        for one in (x, x[0], x[0, 0], slices, wide, x[:0]):
            assert torch.equal(net.linear(one), net.linear.base_layer(one)), one.shape


def test_the_sum_is_written_into_no_view() -> None:
    """A view would have the gradient copied, once a layer."""
    net, _, (x, _) = adapted(torch.bfloat16)
    nodes, names = [net.linear(x.requires_grad_()).grad_fn], []
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert "CopySlices" not in names and names.count("AddmmBackward0") == 2


def test_what_peft_offers_still_works_on_the_layers() -> None:
    net, _, (x, _) = adapted(torch.bfloat16)
    base, with_lora = net.linear.base_layer(x), net.linear(x)
    net.linear.enable_adapters(False)
    assert torch.equal(net.linear(x), base)
    net.linear.enable_adapters(True)
    net.linear.merge()
    assert off(net.linear(x), with_lora.double()) <= 4 * EPS[torch.bfloat16]
    net.linear.unmerge()
    assert not torch.equal(net.linear(x), base)


def test_rounded_and_widened() -> None:
    net, passes, (x, _) = adapted(torch.bfloat16)
    rounded({"net": net})
    assert all(torch.equal(w, w.bfloat16().float()) for w in passes.weights)
    widened({"net": net})
    down, up = (half[ADAPTER].weight for half in (net.linear.lora_A, net.linear.lora_B))
    expected = net.linear.base_layer(x) + (x.float() @ down.T @ up.T) * 3
    assert torch.equal(net.linear(x), expected.bfloat16())


class Case:
    """A policy over a tiny SD3 in half precision whose LoRA has moved, and a point."""

    def __init__(self, moved: float = 0.05) -> None:
        self.model = PipelineModel(build("sd3").to(torch.bfloat16), call=TINY["sd3"].call)
        self.cond = conditioning("sd3", self.model)
        rows = [torch.Generator().manual_seed(row) for row in range(2)]
        made = self.model.rollout(self.cond, steps=3, generators=rows, decode=False, record=True)
        self.step = made.steps[1]
        self.policy = Policy(self.model, LoraSettings(rank=4, alpha=12), 0)
        self.base = self.step.output
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter += moved * torch.randn(parameter.shape, generator=generator)

    def predict(self, weights: Any = "policy") -> Tensor:
        return self.policy.predict(self.step.sample, self.step.level, self.cond, weights)

    def gradients(self) -> list[Tensor]:
        made = self.predict()
        found = torch.autograd.grad(made.float().square().mean(), self.policy.parameters())
        return [made.detach(), *found]


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_at_the_start_all_weights_answer_alike() -> None:
    fresh = Case(moved=0.0)
    for weights in ("policy", "old", "ref"):
        assert torch.equal(fresh.predict(weights).detach(), fresh.base), weights


def test_policy_old_and_reference_over_half_precision(case: Case) -> None:
    trained = case.predict().detach()
    case.policy.old.update(0.0)
    # one formula for all of them: equal weights answer equal bits
    assert torch.equal(case.predict("old"), trained)
    with case.policy.rolling(), torch.no_grad():
        assert torch.equal(
            case.model.predict(case.step.sample, case.step.level, case.cond), trained
        )
    assert torch.equal(case.predict("ref"), case.base)
    assert off(trained, case.base.double()) > 0.01
    assert all(p.dtype == torch.float32 for p in case.policy.state_dict().values())


def test_a_prediction_is_as_near_to_float64_as_with_a_lora_in_float32(case: Case) -> None:
    """The activations' rounding is what counts: the LoRA's own adds little to it."""
    seen: dict[str, Any] = {}
    (own,) = case.model.denoisers.values()
    hook = own.register_forward_pre_hook(lambda _, __, named: seen.update(named), with_kwargs=True)
    case.predict("ref")
    hook.remove()

    def gradients(denoiser: Any, dtype: torch.dtype) -> list[Tensor]:
        given = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in seen.items()}
        made = denoiser(**given)[0]
        trained = [p for p in denoiser.parameters() if p.requires_grad]
        found = torch.autograd.grad(made.double().square().mean(), trained)
        return [made.detach(), torch.cat([one.flatten() for one in found])]

    narrow = gradients(own, torch.bfloat16)
    wide, true = copy.deepcopy(own), copy.deepcopy(own)
    widened({"wide": wide, "true": true})
    before, truth = gradients(wide, torch.bfloat16), gradients(true.double(), torch.float64)
    # 1.6 is the most that was seen in larger random nets
    for one, other, exact in zip(narrow, before, truth, strict=True):
        assert off(one, exact) <= 1.6 * off(other, exact) + 2**-8


def test_gradient_checkpointing_changes_no_bit(case: Case) -> None:
    plain = case.gradients()
    (denoiser,) = case.model.denoisers.values()
    denoiser.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    try:
        made = case.predict()
        case.predict("old")  # other weights are in place between forward and backward
        found = torch.autograd.grad(made.float().square().mean(), case.policy.parameters())
    finally:
        denoiser.disable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    assert torch.equal(made, plain[0])
    assert all(map(torch.equal, found, plain[1:]))


def test_no_layer_is_asked_whether_it_can_be_merged_in_a_pass(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("asked in a pass")

    monkeypatch.setattr("dgpo.models.weights.lora_passes.can_merge", refuse)
    for layer in case.policy.passes.layers:
        monkeypatch.setattr(layer, "enable_adapters", refuse)
    for weights in ("policy", "old", "ref"):
        case.predict(weights)
