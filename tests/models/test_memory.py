"""What saves memory changes no result."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from dgpo.errors import MissingExtra, UserError
from dgpo.models.load import load_pipeline
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.models.quantization import quantized
from dgpo.models.weights.memory import free_text_encoders, save_memory, text_encoders
from dgpo.recipe import Recipe
from dgpo.recipe.sections import LoraSettings, MemorySettings
from families.image import sd3_small
from families.tiny import TINY, build
from tiny_runs import light, settings, trainer

LORA = LoraSettings(rank=4, alpha=12)


def gradients(memory: MemorySettings) -> tuple[list[torch.Tensor], Any]:
    pipe = sd3_small()
    model = PipelineModel(pipe, call=TINY["sd3"].call)
    save_memory(pipe, model.denoisers, memory)
    cond = model.encode(["red dog", "a photo of cat"], guidance=False)
    generators = [torch.Generator().manual_seed(row) for row in range(2)]
    made = model.rollout(cond, steps=2, generators=generators, record=True)
    policy = Policy(model, LORA, seed=1)
    for parameter in policy.parameters():
        parameter.data += 0.01
    policy.predict(made.steps[1].sample, made.steps[1].level, cond).square().mean().backward()
    return [p.grad for p in policy.parameters() if p.grad is not None], made.images


def test_gradient_checkpointing_and_slicing_give_the_same() -> None:
    plain, pictures = gradients(MemorySettings())
    saving, same = gradients(MemorySettings(gradient_checkpointing=True, vae_slicing=True))
    assert len(plain) == len(saving) > 0
    for one, other in zip(plain, saving, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    for one, other in zip(pictures, same, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(("asked", "runs"), [(False, 1), (True, 2)])
def test_blocks_run_again_at_backward_only_with_checkpointing(asked: bool, runs: int) -> None:
    pipe = sd3_small()
    model = PipelineModel(pipe, call=TINY["sd3"].call)
    save_memory(pipe, model.denoisers, MemorySettings(gradient_checkpointing=asked))
    cond = model.encode(["red dog"], guidance=False)
    step = model.rollout(cond, steps=2, record=True, decode=False).steps[0]
    policy = Policy(model, LORA)
    calls: list[int] = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    policy.predict(step.sample, step.level, cond).sum().backward()
    assert len(calls) == runs


def test_what_the_model_does_not_have_is_refused() -> None:
    pipe = sd3_small()
    vars(pipe)["vae"] = torch.nn.Identity()
    with pytest.raises(UserError, match=r"memory\.vae_tiling: Identity of StableDiffusion3"):
        save_memory(pipe, {"transformer": pipe.transformer}, MemorySettings(vae_tiling=True))
    with pytest.raises(UserError, match=r"memory\.gradient_checkpointing: transformer \(Linear\)"):
        save_memory(
            pipe,
            {"transformer": torch.nn.Linear(2, 2)},
            MemorySettings(gradient_checkpointing=True),
        )


def test_text_encoders_are_gone_and_say_so(tmp_path: Path) -> None:
    pipe = sd3_small()
    model = PipelineModel(pipe, call=TINY["sd3"].call, prompt_cache=tmp_path)
    before = model.encode(["red dog"], guidance=True)
    watched = [weakref.ref(module) for module in text_encoders(pipe).values()]
    assert len(watched) == 2
    model.encode_and_free(["red dog", "big table"])
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    after = model.encode(["big table", "red dog"], guidance=True)
    for name, value in before.kwargs.items():
        assert torch.equal(after.kwargs[name][1:], value), name
    assert model.rollout(after, steps=2, guidance_scale=3.0).x0.isfinite().all()
    with pytest.raises(UserError, match=r"memory\.free_text_encoders"):
        model.encode(["the small house"], guidance=False)


def test_a_pipeline_that_encodes_at_every_call_keeps_its_encoder() -> None:
    model = PipelineModel(build("stable_audio"), call=TINY["stable_audio"].call)
    with pytest.raises(UserError, match=r"free_text_encoders: StableAudioPipeline"):
        model.encode_and_free(["red dog"])
    with pytest.raises(UserError, match=r"offload_text_encoders: StableAudioPipeline"):
        model.offload_text_encoders()


def test_text_encoders_are_on_the_device_only_while_they_are_asked() -> None:
    pipe, prompts = sd3_small(), ["red dog", "big table"]
    model = PipelineModel(pipe, call=TINY["sd3"].call)
    before, encoders = model.encode(prompts[:1], guidance=True), text_encoders(pipe)
    model.offload_text_encoders()
    assert text_encoders(pipe) == {} and len(encoders) == 2
    seen: list[bool] = []
    own = pipe.encode_prompt

    def encode_prompt(**given: Any) -> Any:
        seen.append(text_encoders(pipe) == encoders)
        return own(**given)

    vars(pipe)["encode_prompt"] = encode_prompt
    after = model.encode(prompts, guidance=True)
    assert seen == [True] and text_encoders(pipe) == {}
    for name, value in before.kwargs.items():
        assert torch.equal(after.kwargs[name][:1], value), name
    assert model.rollout(after, steps=2, guidance_scale=3.0).x0.isfinite().all()


def test_a_run_that_saves_memory_trains_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    light(monkeypatch)
    weights = []
    saving = {
        "free_text_encoders": True,
        "gradient_checkpointing": True,
        "offload_rewards": True,
        "snapshot_device": "cpu",
    }
    offloading = {"offload_text_encoders": True}
    for name, memory in (("plain", {}), ("saving", saving), ("offloading", offloading)):
        made = trainer(tmp_path / name, memory=memory)
        made.train()
        weights.append([p.detach().clone() for p in made.policy.parameters()])
    assert list((tmp_path / "saving" / "prompt_embeddings").glob("*/*.safetensors"))
    for one, other, same in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert torch.equal(one, same)


def test_only_the_prompts_that_a_run_draws_are_encoded(tmp_path: Path) -> None:
    many = [f"{'big ' * n}table" for n in range(40)]
    made = trainer(
        tmp_path,
        train_dataset=many,
        eval_dataset=["red dog", "the small house"],
        groups_per_iteration=1,
        memory={"free_text_encoders": True},
    )
    drawn = {prompt.text for n in range(2) for prompt in made.sampler.at(n)}
    wanted = {*drawn, many[0], many[1], many[-1], "red dog", "the small house"}
    # and the negative prompt, which is kept as it is encoded beside another one
    assert len(list(tmp_path.glob("prompt_embeddings/*/*.safetensors"))) == len(wanted) + 1
    made.train()


def test_freed_encoders_leave_their_settings() -> None:
    pipe = sd3_small()
    config, dtype = pipe.text_encoder.config, pipe.text_encoder.dtype
    free_text_encoders(pipe)
    assert pipe.text_encoder.config is config and pipe.text_encoder.dtype == dtype
    assert pipe.device == torch.device("cpu")


def test_quantisation_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"memory\.quantization = 'torchao_int8': lora: null"):
        Recipe.from_dict(settings(lora=None, memory={"quantization": "torchao_int8"}))
    with pytest.raises(UserError, match="made by a function"):
        load_pipeline("pocket", "float32", "torchao_int8")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"'bitsandbytes_8bit': .* GPU"):
        quantized(tmp_path, "bitsandbytes_8bit", torch.bfloat16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"dgpo\[quantization\]"):
        quantized(tmp_path, "bitsandbytes_4bit", torch.bfloat16)
