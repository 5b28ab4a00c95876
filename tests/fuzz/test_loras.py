"""Files of LoRAs, odd in any way: one loads, tells how much of it fits and changes what the model
predicts, or there is one error in one line and the pipeline is as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from dgpo import load_lora
from families.tiny import sd3_small
from fuzz.parts import PROFILE, VALUES, changed_bytes, value_or_error

LAYERS = [f"transformer_blocks.{n}.attn.{end}" for n in (0, 1) for end in ("to_q", "to_out.0")]
WIDTH, RANK = 32, 2
PREFIXES = [
    "", "transformer.", "unet.", "module.", "base_model.model.", "diffusion_model.", "lora_unet_",
    "lora_transformer_", "lycoris_", "text_encoder.", "lora_te1_", "transformer_2.", "x.", ".", "_",
    "module.module.transformer.", "slow.transformer.", "diffusion_model.joint_blocks.0.x_block.",
]  # fmt: skip
ENDS = [
    ".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha", ".weight",
    ".lora_A.default.weight", ".lora.up.weight", "_lora.down.weight", ".lora_A", ".bias", "",
    ".lora_alpha", ".lora_B.bias", ".dora_scale", ".lokr_w1", ".hada_w1_a", ".diff", "..", ".lora_",
]  # fmt: skip
STEMS = [*LAYERS, "joint_blocks.0.x_block.attn.qkv", "no.such", "transformer_blocks", "", "猫"]
KEYS = st.tuples(*map(st.sampled_from, (PREFIXES, STEMS, ENDS))).map("".join)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, WIDTH, 96]), max_size=4)
FACTORS = [0.0, 1.0, -1.0, 1e-3, 1e-30, 1e30, float("nan"), float("inf")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
SETTINGS = ["r", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "peft_type"]


@torch.no_grad()
def prediction(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 8, 8), (2, 5, 64), (2, 32))
    given = [torch.randn(*shape, generator=generator) for shape in shapes]
    return pipe.transformer(*given, timestep=torch.tensor([500.0, 20.0])).sample


@pytest.fixture(scope="module")
def pipe() -> Any:
    return sd3_small()


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    value = torch.randn(draw(SHAPES), generator=generator)
    return (value * draw(st.sampled_from(FACTORS))).to(draw(st.sampled_from(DTYPES)))


@st.composite
def loras(draw: st.DrawFn) -> dict[str, Tensor]:
    """A LoRA that fits, and what may have become of it."""
    made: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for layer in draw(st.lists(st.sampled_from(LAYERS), unique=True, max_size=4)):
        prefix = draw(st.sampled_from(PREFIXES))
        down, up = draw(st.sampled_from([("lora_A", "lora_B"), ("lora_down", "lora_up")]))
        name = layer.replace(".", "_") if prefix.endswith("_") else layer
        made[f"{prefix}{name}.{down}.weight"] = torch.randn(RANK, WIDTH, generator=generator)
        made[f"{prefix}{name}.{up}.weight"] = torch.randn(WIDTH, RANK, generator=generator)
        if draw(st.booleans()):
            made[f"{prefix}{name}.alpha"] = torch.tensor(draw(st.sampled_from([*FACTORS, 4.0])))
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from(sorted(made)) | KEYS) if made else draw(KEYS)
        kind = draw(st.sampled_from(["gone", "other", "scaled", "new", "text", "renamed"]))
        if kind == "gone":
            made.pop(key, None)
        elif kind == "scaled" and key in made:
            made[key] = made[key] * draw(st.sampled_from(FACTORS))
        elif kind == "renamed" and key in made:
            made[draw(KEYS)] = made.pop(key)
        elif kind == "text":
            made[draw(st.text(max_size=30))] = draw(tensors())
        else:
            made[key] = draw(tensors())
    return made


@PROFILE
@given(data=st.data())
def test_odd_loras(
    data: st.DataObject, pipe: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "odd.safetensors"
    made = {key: value.contiguous().clone() for key, value in data.draw(loras()).items()}
    settings = st.dictionaries(st.sampled_from([f"transformer.{s}" for s in SETTINGS]), VALUES)
    said = data.draw(st.none() | settings)
    metadata = None if said is None else {"lora_adapter_metadata": json.dumps(said)}
    content = save(made, metadata)
    if data.draw(st.integers(0, 3)) == 0:
        content = data.draw(changed_bytes(content))
    check(file, content, pipe)


@PROFILE
@given(data=st.data())
def test_odd_settings_of_peft(
    data: st.DataObject, pipe: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "odd-peft"
    folder.mkdir(exist_ok=True)
    config = data.draw(VALUES | st.dictionaries(st.sampled_from(SETTINGS), VALUES))
    text = json.dumps(config).encode()
    if data.draw(st.booleans()):
        text = data.draw(changed_bytes(text))
    (folder / "adapter_config.json").write_bytes(text)
    stem = f"base_model.model.{LAYERS[0]}"
    good = {f"{stem}.lora_A.weight": torch.ones(RANK, WIDTH)}
    good[f"{stem}.lora_B.weight"] = torch.ones(WIDTH, RANK)
    check(folder / "adapter_model.safetensors", save(good), pipe)


def check(file: Path, content: bytes, pipe: Any) -> None:
    file.write_bytes(content)
    base = prediction(pipe)
    said: list[str] = []

    def load() -> bool:
        try:
            said.append(load_lora(pipe, file))
        except ValueError as error:
            assert "\n" not in str(error), str(error)
            raise
        return True

    if value_or_error(load):
        assert " tensors fit the transformer (rank" in said[0] and "\n" not in said[0]
        assert not torch.equal(prediction(pipe), base), said[0]
        pipe.unload_lora_weights()
    assert not any("lora" in key for key in pipe.transformer.state_dict())
    assert torch.equal(prediction(pipe), base)
