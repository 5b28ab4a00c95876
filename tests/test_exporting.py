"""What `dgpo export` writes is read back by the programs that it is for, as the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dgpo
from commands import run as command
from dgpo import load_lora
from dgpo.errors import UserError
from dgpo.models import PipelineModel, Policy, load_pipeline
from dgpo.models.weights import lora_files
from dgpo.recipe import LoraSettings
from families.tiny import build, sd3_small
from tiny_runs import light, trainer

CHECKPOINTS = {"checkpoint": {"every": 1, "keep_last": 2}}


class Run:
    """A finished run, and what its weights predict."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            light(patch)
            self.trainer = trainer(folder, **CHECKPOINTS, **settings)
            self.trainer.train()
        self.folder = folder

    def prediction(self, weights: Any) -> Tensor:
        with self.trainer.policy.rolling(weights):
            return prediction(self.trainer.model.pipe.transformer)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("lora") / "run")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("full") / "run", lora=None, train={"lr": 1e-3})


@torch.no_grad()
def prediction(transformer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "hidden_states": (2, 4, 8, 8),
        "encoder_hidden_states": (2, 5, 64),
        "pooled_projections": (2, 32),
    }
    given = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return transformer(**given, timestep=torch.tensor([500.0, 20.0])).sample


def close(found: Tensor, expected: Tensor) -> None:
    """Merged and unmerged weights round differently."""
    base = prediction(sd3_small().transformer)
    assert (found - expected).abs().max() <= 1e-4 * (expected - base).abs().max() > 0


def read_by_diffusers(folder: Path) -> Tensor:
    pipe: Any = sd3_small()
    pipe.load_lora_weights(folder)
    return prediction(pipe.transformer)


def read_by_peft(folder: Path) -> Tensor:
    return prediction(peft.PeftModel.from_pretrained(sd3_small().transformer, str(folder)))


def read_by_us(place: Path) -> Tensor:
    pipe = sd3_small()
    said = load_lora(pipe, place)
    assert "left out" not in said
    return prediction(pipe.transformer)


READERS = {
    "diffusers": (read_by_diffusers, read_by_us),
    "peft": (read_by_peft, read_by_us),
    "kohya": (read_by_us,),
    "comfyui": (read_by_us,),
}


@pytest.mark.parametrize("form", READERS)
def test_each_format_is_the_run_bit_for_bit(form: str, run: Run, tmp_path: Path) -> None:
    said = dgpo.export(run.folder, form, output=tmp_path / "out")
    assert f"tensors for {form} in {tmp_path / 'out'}" in said
    own = read_by_diffusers(run.folder / "lora")
    for read in READERS[form]:
        assert torch.equal(read(tmp_path / "out"), own)
    close(own, run.prediction("slow"))


def test_the_file_of_diffusers_is_the_one_of_the_run(run: Run, tmp_path: Path) -> None:
    dgpo.export(run.folder, output=tmp_path / "one.safetensors")
    own = load_file(run.folder / "lora" / "pytorch_lora_weights.safetensors")
    written = load_file(tmp_path / "one.safetensors")
    assert set(own) == set(written) and all(torch.equal(own[k], written[k]) for k in own)


@pytest.mark.parametrize("weights", ["policy", "old", "slow"])
@pytest.mark.parametrize("form", ["diffusers", "merged"])
def test_each_of_the_weights(weights: Any, form: str, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if form == "diffusers":
        dgpo.export(run.folder, output=out, weights=weights)
        close(read_by_diffusers(out), run.prediction(weights))
        return
    dgpo.export(run.folder, output=out, weights=weights, merge=True, model=sd3_small())
    pipe = load_pipeline(str(out))
    assert torch.equal(prediction(pipe.transformer), run.prediction(weights))
    assert not any("lora" in key for key in pipe.transformer.state_dict())


def test_a_checkpoint_is_exported_and_read(run: Run, tmp_path: Path) -> None:
    first, last = (run.folder / "checkpoints" / f"{n:08d}" for n in (1, 2))
    dgpo.export(first, output=tmp_path / "first")
    found = read_by_diffusers(tmp_path / "first")
    assert torch.equal(found, read_by_us(first))
    assert torch.equal(found, read_by_us(first / "tensors.safetensors"))
    assert torch.equal(read_by_us(last), read_by_us(run.folder))
    assert not torch.equal(found, read_by_us(run.folder))


def test_a_checkpoint_without_its_run(run: Run, tmp_path: Path) -> None:
    place = tmp_path / "checkpoints" / "00000001"
    place.mkdir(parents=True)
    name = "tensors.safetensors"
    (place / name).write_bytes((run.folder / "checkpoints/00000001" / name).read_bytes())
    with pytest.raises(UserError, match=r"lora/ of its run.*in the folder of its run"):
        load_lora(sd3_small(), place)


@pytest.mark.parametrize("weights", ["slow", "policy"])
def test_all_weights_are_merged_alone(weights: Any, full: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trained all weights.*--merge"):
        dgpo.export(full.folder, "kohya", output=tmp_path / "out")
    out, pipe = tmp_path / "out", sd3_small()
    dgpo.export(full.folder, output=out, weights=weights, merge=True, model=pipe)
    pipe = load_pipeline(str(out))
    assert torch.equal(prediction(pipe.transformer), full.prediction(weights))


def test_a_run_of_all_weights_has_no_lora(full: Run) -> None:
    for place, message in (
        (full.folder, "trained all weights: dgpo export --merge"),
        (full.folder / "checkpoints" / "00000002", "holds no LoRA, since its run trained all"),
    ):
        with pytest.raises(UserError, match=message):
            load_lora(sd3_small(), place)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "webui"}, "--format webui: it is not one of diffusers, peft, kohya, comfyui"),
        ({"format": "peft", "merge": True}, "--format peft: --merge writes a pipeline"),
        ({"weights": "ema"}, "--weights ema: it is not one of slow, policy, old"),
        ({"output": "."}, "it is there already"),
        ({"format": "peft", "output": "a.safetensors"}, "written as a folder"),
        ({"merge": True, "output": "a.safetensors"}, "written as a folder"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str, run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        dgpo.export(run.folder, **{"output": tmp_path / "out", **given})
    with pytest.raises(UserError, match="holds no run"):
        dgpo.export(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command(run: Run, tmp_path: Path) -> None:
    said = command("export", str(run.folder), "--format", "kohya").output
    place = run.folder / "export" / "kohya"
    assert str(place) in said
    assert torch.equal(read_by_us(place), read_by_us(run.folder))
    assert "there already" in command("export", str(run.folder), "--format", "kohya", code=2).stderr
    sd3_small().save_pretrained(tmp_path / "base")
    out = ["--output", str(tmp_path / "merged")]
    command("export", str(run.folder), "--merge", "--model", str(tmp_path / "base"), *out)
    merged = load_pipeline(str(tmp_path / "merged"))
    assert torch.equal(prediction(merged.transformer), run.prediction("slow"))


@pytest.mark.parametrize(
    ("name", "form", "own"),
    [
        ("sd15", "kohya", True), ("sdxl", "kohya", True), ("flux", "kohya", True),
        ("sd15", "comfyui", True), ("flux", "comfyui", True), ("wan22", "kohya", False),
        ("pixart_sigma", "peft", False), ("pixart_sigma", "kohya", False),
        ("sd15", "diffusers", True), ("wan22", "diffusers", False),
    ],
)  # fmt: skip
def test_other_families(name: str, form: str, own: bool, tmp_path: Path) -> None:
    """What is written is what was saved, for our loader and, where it has one, for diffusers'."""
    policy = Policy(PipelineModel(build(name)), LoraSettings(rank=4, alpha=6))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    policy.save(tmp_path / "saved", "policy")
    pipes = [build(name) for _ in range(3)]
    load_lora(pipes[0], tmp_path / "saved")
    lora_files.write(lora_files.read(tmp_path / "saved"), tmp_path / "out", form)
    load_lora(pipes[1], tmp_path / "out")
    if own:
        (file,) = (tmp_path / "out").iterdir()
        pipes[2].load_lora_weights(file, adapter_name="default")
    for part in policy.model.denoisers:
        changed = [changes(getattr(pipe, part)) for pipe in pipes[: 3 if own else 2]]
        for other in changed[1:]:
            assert set(changed[0]) == set(other)
            for key, value in changed[0].items():
                assert (other[key] - value).abs().max() <= 1e-6 * value.abs().max(), key


def changes(denoiser: Any) -> dict[str, Tensor]:
    return {
        key: module.get_delta_weight("default")
        for key, module in denoiser.named_modules()
        if hasattr(module, "get_delta_weight")
    }
