"""The examination notices what it is there to notice."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from dgpo.check import examination
from dgpo.check.compatibility import COMPILED, QUESTIONS, Examination, examine
from dgpo.core.sde import FlowSDE
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.models.weights import compute
from dgpo.training.updater import Updater
from families.tiny import build, tiny_model


def examined(change: Callable[[Any], Any] = lambda pipe: pipe) -> Examination:
    def make() -> Any:
        pipe = build("sd3")
        change(pipe)
        return pipe

    return examine(make, partial(tiny_model, "sd3"))


def verdicts(found: Examination) -> dict[str, str]:
    return {question: answer.verdict for question, answer in found.answers.items()}


def test_all_is_well() -> None:
    found = examined()
    assert verdicts(found) == dict.fromkeys(QUESTIONS, "yes")
    assert found.ok and "lora.targets attn.to_q, attn.to_k" in str(found)


def test_a_denoiser_that_does_not_repeat_itself() -> None:
    def shake(pipe: Any) -> None:
        pipe.transformer.register_forward_hook(
            lambda m, i, o: (o[0] + 1e-6 * torch.randn_like(o[0]),)
        )

    found = examined(shake)
    assert not found.ok
    assert found.answers["no guidance"].verdict == "refused"
    assert "differs by" in str(found)


def test_a_decoder_whose_numbers_are_not_finite() -> None:
    def overflow(pipe: Any) -> None:
        own = pipe.vae.decode
        pipe.vae.decode = lambda *given, **named: (own(*given, **named)[0] * torch.inf,)

    found = examined(overflow)
    assert not found.ok and found.decoded.verdict == "no"
    said = r"samples +no: 2 of 2 samples are lost: the decoder \(AutoencoderKL\) returned numbers"
    assert re.search(said, str(found))


def test_a_pipeline_that_is_refused_says_why_in_every_answer() -> None:
    found = examined(lambda pipe: pipe.register_modules(transformer=None))
    assert not found.ok
    assert all("transformer" in answer.note for answer in found.answers.values())
    assert str(found).count("transformer") == found.answers["DGPO"].cell.count("transformer")


@pytest.mark.parametrize("guided", [False, True])
def test_embeddings_that_are_not_the_pipelines(guided: bool, monkeypatch: Any) -> None:
    own = PipelineModel.encode
    key = "negative_prompt_embeds" if guided else "prompt_embeds"

    def wrong(self: Any, prompts: Any, guidance: bool) -> Any:
        cond = own(self, prompts, guidance)
        cond.kwargs[key].mul_(1.001)
        return cond

    monkeypatch.setattr(PipelineModel, "encode", wrong)
    answer = examined().answers["prompts"]
    assert answer.verdict == "no" and f"guidance {3 if guided else 1}," in answer.note


def test_a_step_whose_density_is_not_that_of_the_policy(monkeypatch: Any) -> None:
    own = FlowSDE.moments
    seen: list[Any] = []

    def drifting(self: Any, *given: Any) -> Any:
        seen.append(given)
        made = own(self, *given)
        return replace(made, mean=made.mean + 1e-4 * len(seen))

    monkeypatch.setattr(FlowSDE, "moments", drifting)
    found = examined()
    assert found.answers["SDE"].verdict == "no" and not found.ok


def test_a_frozen_weight_that_moves(monkeypatch: Any) -> None:
    own = Updater.update

    def careless(self: Any, *given: Any, **named: Any) -> Any:
        with torch.no_grad():
            self.policy.model.pipe.vae.decoder.conv_in.bias[0] += 1e-6
        return own(self, *given, **named)

    monkeypatch.setattr(Updater, "update", careless)
    answer = examined().answers["DGPO"]
    assert answer.verdict == "no" and "decoder.conv_in.bias moved" in answer.note


def test_an_objective_that_rises(monkeypatch: Any) -> None:
    own = Updater.__init__

    def uphill(self: Any, *given: Any) -> None:
        own(self, *given)
        self.optimizer.param_groups[0]["maximize"] = True

    monkeypatch.setattr(Updater, "__init__", uphill)
    answer = examined().answers["DGPO"]
    assert answer.verdict == "no" and "objective went from 0.69" in answer.note


def test_a_reference_that_is_not_the_base(monkeypatch: Any) -> None:
    own = Policy.predict

    def trained(
        self: Any, xt: Any, level: Any, cond: Any, weights: str = "policy", scale: float = 1.0
    ) -> Any:
        return own(self, xt, level, cond, "policy", scale)

    monkeypatch.setattr(Policy, "predict", trained)
    assert examined().answers["reference"].verdict == "no"


def read_weaker(monkeypatch: Any) -> None:
    """LoRA files are read with nine tenths of their strength."""
    own = examination.read_back

    def weaker(pipe: Any, folder: Any) -> Any:
        how = own(pipe, folder)
        pipe.set_adapters(pipe.get_active_adapters(), [0.9])
        return how

    monkeypatch.setattr(examination, "read_back", weaker)


def test_a_lora_that_is_read_with_another_strength(monkeypatch: Any) -> None:
    read_weaker(monkeypatch)
    assert examined().answers["LoRA file"].verdict == "no"


def in_half(name: str) -> Any:
    """In bfloat16, but for the autoencoder; samples of Wan are float32 all the same."""
    pipe = build(name)
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module) and part != "vae":
            module.to(torch.bfloat16)
    return pipe


# SD3's objective hears nothing of small steps there
@pytest.mark.parametrize("name", ["wan", pytest.param("sd3", marks=pytest.mark.slow)])
def test_half_precision_rounds_and_is_no_difference(name: str) -> None:
    found = examine(partial(in_half, name), partial(tiny_model, name))
    assert verdicts(found) == dict.fromkeys(QUESTIONS, "yes"), str(found)
    assert "bit for bit in float32, within" in found.answers["LoRA file"].figures


@pytest.mark.slow
def test_a_lora_that_is_read_with_another_strength_in_half_precision(monkeypatch: Any) -> None:
    read_weaker(monkeypatch)
    found = examine(partial(in_half, "wan"), partial(tiny_model, "wan"))
    assert found.answers["LoRA file"].verdict == "no"


def test_a_reference_of_one_expert_that_is_not_the_base(monkeypatch: Any) -> None:
    own = Policy.predict
    seen: list[str] = []

    def noisy_at_first(self: Any, xt: Any, level: Any, *given: Any, **named: Any) -> Any:
        answer = own(self, xt, level, *given, **named)
        if given[1:2] != ("ref",):
            return answer
        boundary = 0.875  # of tiny Wan 2.2: above it the first expert is asked
        seen.append("transformer" if float(level.timestep) >= boundary * 1000 else "transformer_2")
        return answer + 1e-6 if seen[-1] == "transformer" else answer

    monkeypatch.setattr(Policy, "predict", noisy_at_first)
    found = examine(partial(build, "wan22"), partial(tiny_model, "wan22"))
    assert found.answers["reference"].verdict == "no" and "t=999" in found.answers["reference"].note


def test_a_lora_of_one_expert_that_is_lost(monkeypatch: Any) -> None:
    own = examination.read_back

    def careless(pipe: Any, folder: Any) -> Any:
        how = own(pipe, folder)
        for name, tensor in pipe.transformer.state_dict().items():
            if "lora_B" in name:
                tensor.zero_()
        return how

    monkeypatch.setattr(examination, "read_back", careless)
    found = examine(partial(build, "wan22"), partial(tiny_model, "wan22"))
    assert verdicts(found) == {**dict.fromkeys(QUESTIONS, "yes"), "LoRA file": "no"}


def test_an_expert_that_is_not_trained(monkeypatch: Any) -> None:
    own = Updater.__init__

    def forgetful(self: Any, policy: Any, *given: Any) -> None:
        own(self, policy, *given)
        second = {id(p) for p in policy.model.pipe.transformer_2.parameters()}
        (group,) = self.optimizer.param_groups
        group["params"] = [p for p in group["params"] if id(p) not in second]

    monkeypatch.setattr(Updater, "__init__", forgetful)
    answer = examine(partial(build, "wan22"), partial(tiny_model, "wan22")).answers["DGPO"]
    assert answer.verdict == "no" and "no trained weight of transformer_2" in answer.note


def test_the_second_iteration_samples_what_the_first_has_trained(monkeypatch: Any) -> None:
    sampled: list[Any] = []
    own = Policy.rolling

    def rolling(self: Any, weights: Any = "policy") -> Any:
        sampled.append([parameter.detach().clone() for parameter in self.parameters()])
        return own(self, weights)

    monkeypatch.setattr(Policy, "rolling", rolling)
    assert examined().answers["DGPO"].verdict == "yes"
    first, second = sampled
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_error_in_one_question_leaves_the_others(monkeypatch: Any) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no room\nand more")

    monkeypatch.setattr(Policy, "save", broken)
    found = examined()
    assert found.answers["LoRA file"].cell == "no: RuntimeError: no room"
    assert found.answers["DGPO"].verdict == "yes"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_denoiser_is_asked_one_question_more(dtype: Any, monkeypatch: Any) -> None:
    # each graph runs as it was traced, so that no compiler is needed
    monkeypatch.setattr(compute, "BACKEND", lambda graph, inputs: graph.forward)

    def make() -> Any:
        return build("sd3").to(dtype)

    found = examine(make, partial(tiny_model, "sd3"), compiled="blocks")
    torch._dynamo.reset()
    assert verdicts(found) == dict.fromkeys([*QUESTIONS, COMPILED], "yes"), str(found)
    assert "8 passes within 0e+00 of eager ones" in str(found)
