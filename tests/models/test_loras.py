"""The loader of LoRAs: files as each trainer writes them mean the same, and the rest is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from dgpo import load_lora
from dgpo.errors import UserError
from dgpo.models.weights import lora_files
from families.tiny import build, conditioning, sd3_small, tiny_model

ALPHA, RANK = 6.0, 4
Matrices = dict[str, tuple[Tensor, Tensor]]
ENDS = {
    "sd3": ("attn.to_q", "attn.to_out.0", "attn.add_k_proj", "ff.net.2", "context_embedder"),
    "flux": ("attn.to_q", "attn.to_out.0", "proj_out", "x_embedder", "norm.linear"),
    "sd15": ("attn1.to_q", "attn2.to_out.0", "proj_in", "conv1", "time_emb_proj", "conv_in"),
    "sdxl": ("attn1.to_q", "attn2.to_out.0", "ff.net.2", "proj_out"),
    "wan": ("attn1.to_q", "attn2.to_out.0"),
    "pixart_sigma": ("attn1.to_k", "ff.net.2"),
}


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def matrices(pipe: Any, ends: tuple[str, ...], rank: int = RANK) -> Matrices:
    """A random LoRA for the layers whose names end so."""
    generator, made = torch.Generator().manual_seed(5), {}
    for name, module in denoiser(pipe).named_modules():
        if name.endswith(ends) and isinstance(module, (nn.Linear, nn.Conv2d)):
            out, *inside = module.weight.shape
            one = [1] * (len(inside) - 1)
            down = torch.randn(rank, *inside, generator=generator)
            made[name] = (down, torch.randn(out, rank, *one, generator=generator))
    return made


def deltas(pipe: Any) -> dict[str, Tensor]:
    """What the LoRA of a pipeline adds to each weight."""
    made: dict[str, Any] = dict(denoiser(pipe).named_modules())
    return {n: m.get_delta_weight("default") for n, m in made.items() if hasattr(m, "lora_A")}


def wanted(layers: Matrices, scale: float = ALPHA / RANK) -> dict[str, Tensor]:
    return {
        name: ((up.flatten(1) @ down.flatten(1)) * scale).reshape(len(up), *down.shape[1:])
        for name, (down, up) in layers.items()
    }


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-6 * value.abs().max(), name


def named(
    layers: Matrices, prefix: str, down: str = "lora_A", up: str = "lora_B", dot: str = "."
) -> dict[str, Tensor]:
    made = {}
    for name, (a, b) in layers.items():
        stem = f"{prefix}{name.replace('.', dot)}"
        made |= {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b}
        made[f"{stem}.alpha"] = torch.tensor(ALPHA)
    return made


def kohya(layers: Matrices, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    return named(layers, prefix, "lora_down", "lora_up", "_")


def written(folder: Path, tensors: Mapping[str, Tensor], **metadata: Any) -> Path:
    file = folder / "some.safetensors"
    said = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file({key: value.clone() for key, value in tensors.items()}, file, said)
    return file


FORMS: dict[str, Callable[[Matrices], dict[str, Tensor]]] = {
    "diffusers": lambda layers: named(layers, "transformer."),
    "diffusers of a UNet": lambda layers: named(layers, "unet."),
    "peft": lambda layers: named(layers, "base_model.model."),
    "no prefix": lambda layers: named(layers, ""),
    "kohya": kohya,
    "kohya's matrices by dots": lambda layers: named(layers, "", "lora_down", "lora_up"),
    "OneTrainer": lambda layers: kohya(layers, "lora_transformer_"),
    "LyCORIS": lambda layers: kohya(layers, "lycoris_"),
    "ComfyUI, ai-toolkit": lambda layers: named(layers, "diffusion_model."),
    "DDP": lambda layers: named(layers, "module.transformer."),
    "DDP, peft, compiled": lambda layers: named(layers, "module._orig_mod.base_model.model."),
    "with the adapter's name": lambda layers: named(
        layers, "transformer.", "lora_A.default", "lora_B.default"
    ),
    "early diffusers": lambda layers: named(layers, "", "lora.down", "lora.up"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_every_form_of_names_means_the_same(form: str, name: str, tmp_path: Path) -> None:
    pipe = build(name)
    layers = matrices(pipe, ENDS[name])
    count = 3 * len(layers)
    said = load_lora(pipe, written(tmp_path, FORMS[form](layers)))
    part = "unet" if name == "sd15" else "transformer"
    assert said.endswith(f": {count} of {count} tensors fit the {part} (rank 4)")
    same(deltas(pipe), wanted(layers))


@pytest.mark.parametrize("form", ["diffusers", "kohya", "OneTrainer", "no prefix"])
@pytest.mark.parametrize("name", ["flux", "sdxl", "wan", "pixart_sigma"])
def test_other_families(form: str, name: str, tmp_path: Path) -> None:
    pipe = build(name)
    layers = matrices(pipe, ENDS[name])
    load_lora(pipe, written(tmp_path, FORMS[form](layers)))
    same(deltas(pipe), wanted(layers))


def test_attention_processors_of_early_diffusers(tmp_path: Path) -> None:
    pipe = build("sd15")
    layers = matrices(pipe, ("attn1.to_q", "attn2.to_out.0"))
    tensors = {}
    for name, (down, up) in layers.items():
        block, _, last = name.removesuffix(".0").rpartition(".")
        tensors[f"unet.{block}.processor.{last}_lora.down.weight"] = down
        tensors[f"unet.{block}.processor.{last}_lora.up.weight"] = up
    load_lora(pipe, written(tmp_path, tensors))
    same(deltas(pipe), wanted(layers, 1.0))


def fused(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One LoRA for layers that lie one below the other in one matrix."""
    return torch.cat([a for a, _ in parts]), torch.block_diag(*(b for _, b in parts))


def rescaled(down: Tensor, up: Tensor, stem: str) -> dict[str, Tensor]:
    """As kohya's scripts write it, with an alpha that keeps the scale at 1.5."""
    return {
        f"{stem}.lora_down.weight": down,
        f"{stem}.lora_up.weight": up,
        f"{stem}.alpha": torch.tensor(ALPHA / RANK * len(down)),
    }


SD3_BLOCKS = {
    "x_block": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj"),
    "context_block": (
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff_context.net.0.proj",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", ["kohya", "ComfyUI"])
def test_the_first_names_of_sd3(form: str, tmp_path: Path) -> None:
    pipe = sd3_small()
    ends = ("norm1_context.linear", *(end for ends in SD3_BLOCKS.values() for end in ends))
    layers = matrices(pipe, ends)
    tensors = {}
    for number in range(2):
        block = f"transformer_blocks.{number}"
        own: dict[str, tuple[Tensor, Tensor]] = {}
        for side, (*qkv, out, first) in SD3_BLOCKS.items():
            own[f"{side}.attn.qkv"] = fused([layers[f"{block}.{end}"] for end in qkv])
            if f"{block}.{out}" in layers:  # the last context block has none
                own[f"{side}.attn.proj"] = layers[f"{block}.{out}"]
                own[f"{side}.mlp.fc1"] = layers[f"{block}.{first}"]
        down, up = layers[f"{block}.norm1_context.linear"]
        up = torch.cat(up.chunk(2)[::-1]) if number == 1 else up  # shift and scale change places
        own["context_block.adaLN_modulation.1"] = (down, up)
        for layer, (down, up) in own.items():
            stem = f"joint_blocks.{number}.{layer}"
            dotted = f"diffusion_model.{stem}"
            stem = dotted if form == "ComfyUI" else f"lora_unet_{stem.replace('.', '_')}"
            tensors |= rescaled(down, up, stem)
    said = load_lora(pipe, written(tmp_path, tensors))
    assert "left out" not in said
    same(deltas(pipe), wanted(layers))


@pytest.mark.parametrize("form", ["kohya", "ComfyUI", "ComfyUI, A and B"])
def test_the_first_names_of_flux(form: str, tmp_path: Path) -> None:
    pipe = build("flux")
    qkv = tuple(f"transformer_blocks.0.attn.to_{x}" for x in "qkv")
    layers = matrices(pipe, (*qkv, "transformer_blocks.0.attn.to_out.0"))
    layers = {name: pair for name, pair in layers.items() if not name.startswith("single")}
    tensors = {}
    for layer, (down, up) in {
        "img_attn.qkv": fused([layers[name] for name in qkv]),
        "img_attn.proj": layers["transformer_blocks.0.attn.to_out.0"],
    }.items():
        stem = f"double_blocks.0.{layer}"
        flat = f"lora_unet_{stem.replace('.', '_')}"
        made = rescaled(down, up, flat if form == "kohya" else f"diffusion_model.{stem}")
        if "A and B" in form:
            words = {"lora_down": "lora_A", "lora_up": "lora_B"}
            for old, new in words.items():
                made = {key.replace(old, new): value for key, value in made.items()}
        tensors |= made
    load_lora(pipe, written(tmp_path, tensors))
    same(deltas(pipe), wanted(layers))


def test_the_first_names_of_sdxl(tmp_path: Path) -> None:
    pipe = build("sdxl")
    layers = matrices(pipe, ("attn1.to_q", "attn2.to_out.0", "ff.net.2"))
    places = {
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
    }
    moved = {}
    for name, pair in layers.items():
        new, old = next((n, o) for n, o in places.items() if name.startswith(n))
        moved[name.replace(new, old)] = pair
    load_lora(pipe, written(tmp_path, kohya(moved)))
    same(deltas(pipe), wanted(layers))


def test_the_first_names_of_wan(tmp_path: Path) -> None:
    pipe = build("wan")
    layers = matrices(pipe, ("attn1.to_q", "attn2.to_k"))
    words = {"attn1.to_q": "self_attn.q", "attn2.to_k": "cross_attn.k"}
    moved = {}
    for name, pair in layers.items():
        for new, old in words.items():
            moved[name.replace(new, old)] = pair
    moved = {name: pair for name, pair in moved.items() if "_attn" in name}
    load_lora(pipe, written(tmp_path, named(moved, "diffusion_model.")))
    same(deltas(pipe), wanted(layers))


def test_each_layer_has_its_own_alpha_and_rank(tmp_path: Path) -> None:
    pipe = sd3_small()
    four = matrices(pipe, ("attn.to_q",))
    two = matrices(pipe, ("attn.to_k",), rank=2)
    tensors = kohya({**four, **two})
    first = next(iter(four))
    tensors[f"lora_unet_{first.replace('.', '_')}.alpha"] = torch.tensor(1.0)
    said = load_lora(pipe, written(tmp_path, tensors))
    assert "(ranks 2 to 4)" in said
    expected = {**wanted(four), **wanted(two, ALPHA / 2)}
    expected[first] = wanted({first: four[first]}, 1 / RANK)[first]
    same(deltas(pipe), expected)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 10}, 10 / 4),
        ({"lora_alpha": 10, "use_rslora": True}, 10 / 2),
        ({}, 1.0),  # as diffusers takes a file that says nothing
        ({"r": 4, "lora_alpha": 1, "alpha_pattern": {"attn.to_q": 3}}, 3 / 4),
    ],
)
@pytest.mark.parametrize("form", ["metadata", "adapter_config.json"])
def test_the_settings_of_peft(
    config: dict[str, Any], scale: float, form: str, tmp_path: Path
) -> None:
    pipe = sd3_small()
    layers = matrices(pipe, ("attn.to_q",))
    plain = named(layers, "transformer." if form == "metadata" else "base_model.model.")
    plain = {key: value for key, value in plain.items() if "alpha" not in key}
    if form == "metadata":
        place = written(tmp_path, plain, **{f"transformer.{k}": v for k, v in config.items()})
    else:
        save_file(plain, tmp_path / "adapter_model.safetensors")
        if config:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        place = tmp_path
    load_lora(pipe, place)
    same(deltas(pipe), wanted(layers, scale))


def test_the_strength_of_a_lora(tmp_path: Path) -> None:
    pipe = sd3_small()
    layers = matrices(pipe, ("attn.to_q",))
    file = written(tmp_path, named(layers, "transformer."))
    with pytest.raises(UserError, match="changes nothing: its scale is zero"):
        load_lora(pipe, file, weight=0)
    load_lora(pipe, file, weight=0.5)
    same(deltas(pipe), wanted(layers, ALPHA / RANK / 2))


def test_files_of_torch_are_read_as_tensors_alone(tmp_path: Path) -> None:
    pipe = sd3_small()
    layers = matrices(pipe, ("attn.to_q",))
    for name, value in {
        "plain.bin": named(layers, "transformer."),
        "nested.pt": {"state_dict": named(layers, "transformer.")},
    }.items():
        torch.save(value, tmp_path / name)
        pipe = sd3_small()
        load_lora(pipe, tmp_path / name)
        same(deltas(pipe), wanted(layers))
    torch.save({"a": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(UserError, match=r"code in it is not run"):
        load_lora(sd3_small(), tmp_path / "code.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(UserError, match="no dict of tensors"):
        load_lora(sd3_small(), tmp_path / "list.pt")


def test_what_fits_in_part_is_told(tmp_path: Path) -> None:
    pipe = sd3_small()
    layers = matrices(pipe, ("attn.to_q",))
    tensors = named(layers, "transformer.")
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    for stem in (f"text_encoder.{text}", f"lora_te1_{text.replace('.', '_')}"):
        tensors[f"{stem}.lora_down.weight"] = torch.ones(4, 32)
    tensors["transformer.no.such.layer.lora_A.weight"] = torch.ones(4, 32)
    said = load_lora(pipe, written(tmp_path, tensors))
    assert "6 of 9 tensors fit the transformer (rank 4)" in said
    assert "2 for text_encoder are left out" in said
    assert "1 fit nothing, such as 'transformer.no.such.layer.lora_A.weight'" in said
    same(deltas(pipe), wanted(layers))


def broken(layers: Matrices) -> dict[str, tuple[dict[str, Tensor], str]]:
    """Files that are refused, each with a part of the message."""
    good = named(layers, "transformer.")
    key = next(key for key in good if key.endswith("lora_B.weight"))
    down = key.replace("lora_B", "lora_A")
    te = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    stem = key.removesuffix(".lora_B.weight")
    return {
        "another model": (
            {"transformer.blocks.0.attn.q.lora_A.weight": torch.ones(4, 8)},
            "none of its 1 tensors fits the pipeline, such as 'transformer.blocks.0",
        ),
        "no LoRA": ({"decoder.weight": torch.ones(2)}, "none of its 1 tensors fits"),
        "nothing": ({}, "none of its 0 tensors fits"),
        "text encoders": (
            {f"{te}.lora_A.weight": torch.ones(4, 8), f"{te}.lora_B.weight": torch.ones(8, 4)},
            "all of its 2 tensors are for text encoders",
        ),
        "other widths": (
            {**good, down: torch.ones(4, 640)},
            rf"'{down}' has the shape \[4, 640\], and the transformer needs \[4, 32\]",
        ),
        "other widths of B": ({**good, key: torch.ones(640, 4)}, r"\[640, 4\].*\[32, 4\]"),
        "other ranks": ({**good, key: torch.ones(32, 3)}, r"\[32, 3\].*\[32, 4\]"),
        "no rank": ({**good, key: torch.ones(32, 0), down: torch.ones(0, 32)}, "no rank"),
        "half a pair": ({k: v for k, v in good.items() if k != key}, "without its other matrix"),
        "twice": ({**good, key.removeprefix("transformer."): good[key]}, "are both of"),
        "two adapters": (
            {**good, **named(layers, "", "lora_A.one", "lora_B.two")},
            "several adapters: one, two",
        ),
        "not finite": ({**good, key: torch.full((32, 4), torch.nan)}, "not finite"),
        "whole numbers": ({**good, key: torch.ones(32, 4, dtype=torch.int64)}, "not finite real"),
        "an alpha that is none": ({**good, f"{stem}.alpha": torch.ones(3)}, "no finite number"),
        "B zero": (
            {k: v * ("lora_B" not in k) for k, v in good.items()},
            "changes nothing: all of its B are zero",
        ),
        "A zero": ({k: v * ("lora_A" not in k) for k, v in good.items()}, "its A are zero"),
        "scale zero": ({k: v * ("alpha" not in k) for k, v in good.items()}, "scale is zero"),
        "too small": (
            {k: v * 1e-15 if "lora" in k else v for k, v in good.items()},
            "lost in the rounding",
        ),
        "DoRA": ({**good, f"{stem}.dora_scale": torch.ones(32)}, "it is DoRA, and only plain"),
        "DoRA of peft": ({**good, f"{stem}.lora_magnitude_vector": torch.ones(32)}, "is DoRA"),
        "LoKr": ({f"{stem}.lokr_w1": torch.ones(2, 2)}, "it is LoKr"),
        "LoHa": ({f"{stem}.hada_w1_a": torch.ones(2, 2)}, "it is LoHa"),
        "OFT": ({f"{stem}.oft_blocks": torch.ones(2, 2)}, "it is OFT"),
        "IA3": ({f"{stem}.ia3_l": torch.ones(2, 2)}, "it is IA3"),
        "GLoRA": ({f"{stem}.a1.weight": torch.ones(2, 2)}, "it is GLoRA"),
        "three matrices": ({**good, f"{stem}.lora_mid.weight": torch.ones(4)}, "lora_mid"),
        "biases": ({**good, f"{stem}.lora_B.bias": torch.ones(32)}, "with biases"),
    }


CASES = broken(matrices(sd3_small(), ("attn.to_q",)))


@pytest.fixture(scope="module")
def pocket() -> Any:
    """Nothing here changes it: what is refused leaves a pipeline as it was."""
    return sd3_small()


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused(case: str, pocket: Any, tmp_path: Path) -> None:
    tensors, message = CASES[case]
    file = written(tmp_path, tensors)
    with pytest.raises(UserError, match=message) as error:
        load_lora(pocket, file)
    assert str(error.value).startswith(f"LoRA {file}: ") and "\n" not in str(error.value)
    assert not any("lora" in key for key in pocket.transformer.state_dict())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "it is LOHA"),
        ({"peft_type": "LORA", "use_dora": True}, "it is DoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "base weights that were changed"),
        ({"lora_alpha": "x"}, "no alpha"),
        ({"lora_alpha": float("nan")}, "alpha nan"),
        ({"alpha_pattern": {"(": 3}}, "no alpha"),
        ([1], "is damaged"),
    ],
)
def test_settings_of_peft_that_are_refused(
    config: Any, message: str, pocket: Any, tmp_path: Path
) -> None:
    layers = matrices(pocket, ("attn.to_q",))
    tensors = {k: v for k, v in named(layers, "").items() if "alpha" not in k}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_lora(pocket, tmp_path)


def test_folders_that_are_refused(pocket: Any, tmp_path: Path) -> None:
    empty, several, whole, full = (tmp_path / n for n in ("empty", "several", "whole", "full"))
    for folder in (empty, several, whole, full / "model"):
        folder.mkdir(parents=True)
    for name in "ab":
        save_file({}, several / f"{name}.safetensors")
    (whole / "model_index.json").touch()
    (full / "recipe.yaml").touch()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(b'\x08\x00\x00\x00\x00\x00\x00\x00{"a": ')
    for place, message in (
        (tmp_path / "none", "no such file or folder"),
        (empty, "holds no LoRA"),
        (several, r"it holds 2 files \(a.safetensors, b.safetensors"),
        (whole, "holds a whole pipeline"),
        (full, "trained all weights: dgpo export --merge"),
        (cut, "the file is damaged"),
    ):
        with pytest.raises(UserError, match=message):
            load_lora(pocket, place)


def test_a_pipeline_that_has_a_lora_already(tmp_path: Path) -> None:
    pipe = sd3_small()
    file = written(tmp_path, named(matrices(pipe, ("attn.to_q",)), ""))
    load_lora(pipe, file)
    with pytest.raises(UserError, match="carries a LoRA already"):
        load_lora(pipe, file)
    pipe.unload_lora_weights()
    load_lora(pipe, file)


@pytest.mark.parametrize("name", ["sd3", "sd15", "flux"])
@pytest.mark.parametrize("half", [False, True])
def test_it_loads_what_diffusers_loads(name: str, half: bool, tmp_path: Path) -> None:
    """Bit for bit: the matrices, their precision and the scales."""
    ours, theirs = build(name), build(name)
    layers = matrices(ours, ENDS[name])
    part = "unet" if name == "sd15" else "transformer"
    tensors = {k: v for k, v in named(layers, f"{part}.").items() if "alpha" not in k}
    settings = {"r": RANK, "lora_alpha": 7, "target_modules": list(layers)}
    file = written(tmp_path, tensors, **{f"{part}.{k}": v for k, v in settings.items()})
    found = []
    for pipe in (ours, theirs):
        pipe.to(torch.bfloat16 if half else torch.float32)
        load_lora(pipe, file) if pipe is ours else pipe.load_lora_weights(
            file, adapter_name="default"
        )
        scales = [m.scaling for m in denoiser(pipe).modules() if isinstance(m, LoraLayer)]
        found.append((denoiser(pipe).state_dict(), scales))
    (own, scales), (other, others) = found
    assert scales == others and set(own) == set(other)
    assert all(own[k].dtype == v.dtype and torch.equal(own[k], v) for k, v in other.items())


def test_a_lora_changes_the_prediction_and_no_random_state(tmp_path: Path) -> None:
    model = tiny_model("sd3")
    cond = conditioning("sd3", model)

    def made() -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        return model.rollout(cond, steps=1, guidance_scale=1.0, generators=generators).x0

    base, before = made(), torch.random.get_rng_state()
    load_lora(model.pipe, written(tmp_path, kohya(matrices(model.pipe, ENDS["sd3"]))))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(made(), base)
    model.pipe.disable_lora()
    assert torch.equal(made(), base)


def test_a_second_expert(tmp_path: Path) -> None:
    pipe = build("wan22")
    layers = matrices(pipe, ("attn1.to_q",))
    names = {"": "transformer", "transformer_2": "transformer_2"}
    for folder in names:
        (tmp_path / folder).mkdir(exist_ok=True)
        tensors = {k: v for k, v in named(layers, "transformer.").items() if "alpha" not in k}
        save_file(tensors, tmp_path / folder / "pytorch_lora_weights.safetensors")
    said = load_lora(pipe, tmp_path)
    total = 4 * len(layers)
    assert f"{total // 2} of {total} tensors fit the transformer_2 (rank 4)" in said
    for part in names.values():
        adapted = [m for m in getattr(pipe, part).modules() if isinstance(m, LoraLayer)]
        assert len(adapted) == len(layers)
    assert set(lora_files.read(tmp_path).tensors) > {
        "transformer_2." + next(iter(layers)) + ".lora_A.weight"
    }
