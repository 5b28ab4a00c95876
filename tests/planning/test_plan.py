"""A plan says before the run what the run then does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

from dgpo.cli import app
from dgpo.errors import UserError
from dgpo.models import PipelineModel
from dgpo.models.load import load_pipeline
from dgpo.planning import Machine, make_plan
from dgpo.planning.counts import calls_of
from dgpo.planning.memory import Estimate, Memory
from dgpo.planning.meta_memory import needs
from dgpo.planning.skeleton import bytes_of, skeleton
from dgpo.preferences import GroupWriter
from dgpo.prompts import load_prompts
from dgpo.recipe import Recipe
from dgpo.trainer import Trainer
from families.tiny import TINY, build
from tiny_runs import light, settings

GPU = Machine("cuda")
WORDS = ["a photo of cat", "red dog", "the small house", "big table"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(WORDS))
    return file


def recipe(model: str, rows: Path, **changes: Any) -> Recipe:
    given: dict[str, Any] = {
        "model": model,
        "rewards": {"brightness": 1.0},
        "prompts": {"train": str(rows), "eval": str(rows)},
        "lora": {"rank": 4, "alpha": 8, "targets": ["to_q", "to_v"]},
    }
    return Recipe.from_dict(settings(**{**given, **changes}))


def saved(name: str, folder: Path, weights: bool = False) -> Path:
    """A hub-style folder; without weights it has configs and tokenizers alone."""
    build(name).save_pretrained(folder)
    if not weights:
        for file in folder.glob("**/*.safetensors"):
            file.unlink()
    return folder


CALLS = {"wan": TINY["wan"].call, "sd15": TINY["sd15"].call, "sd3": TINY["sd3"].call}


@pytest.mark.parametrize("name", ["sd3", "sd15", "wan"])
def test_sizes_come_from_configs_alone(name: str, tmp_path: Path, prompts: Path) -> None:
    folder = saved(name, tmp_path / name)
    made = make_plan(recipe(str(folder), prompts, rollout={"steps": 3, "call": CALLS[name]}), GPU)
    pipe = build(name)
    real = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    assert made.parameters == {n: sum(p.numel() for p in m.parameters()) for n, m in real.items()}
    for part, module in real.items():
        assert made.memory.parts[part] == bytes_of(module)
    assert not made.memory.notes
    assert made.memory.phases["training"] > made.memory.parts["gradients"]
    assert made.memory.peak == sum(made.memory.parts.values()) + max(made.memory.phases.values())


def test_on_the_cpu_training_adds_to_what_other_phases_have_freed() -> None:
    phases = {"rollout": 30, "training": 50, "evaluation": 20}
    assert Memory({"libraries": 100}, phases, kept=True).peak == 180
    assert Memory({"transformer": 100}, phases).peak == 150


def test_guidance_that_is_set_in_a_guider_is_counted(prompts: Path) -> None:
    peaks = []
    for scale in (1.0, 3.0):
        pipe = build("hunyuan_video15")
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.to("meta")
        rollout = {"guidance_scale": scale, "call": TINY["hunyuan_video15"].call}
        estimate = Estimate(recipe("tiny", prompts, rollout=rollout), pipe, WORDS[0], 0, GPU)
        made = estimate.memory(1)
        assert not made.notes
        peaks.append(made.phases["rollout"])
    assert peaks[0] < peaks[1]


def test_nothing_of_a_skeleton_has_numbers(tmp_path: Path) -> None:
    pipe = skeleton(str(saved("sd3", tmp_path / "sd3")), "bfloat16")
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            assert all(p.is_meta and p.dtype == torch.bfloat16 for p in part.parameters())
    with pytest.raises(UserError, match="cannot be read as a pipeline"):
        load_pipeline(str(tmp_path / "sd3"))


def test_half_precision_is_what_loading_makes_of_it(tmp_path: Path) -> None:
    folder = str(saved("wan", tmp_path / "wan", weights=True))
    planned, loaded = skeleton(folder, "bfloat16"), load_pipeline(folder, "bfloat16")
    for name, module in loaded.components.items():
        if isinstance(module, nn.Module):
            own = planned.components[name].state_dict()
            for key, value in module.state_dict().items():
                assert own[key].dtype == value.dtype, (name, key)
    kept = {parameter.dtype for parameter in loaded.transformer.parameters()}
    assert kept == {torch.bfloat16, torch.float32}


def test_a_vae_of_its_own_precision_is_planned(tmp_path: Path, prompts: Path) -> None:
    folder = str(saved("sd3", tmp_path / "sd3"))
    call = {"rollout": {"steps": 3, "call": CALLS["sd3"]}, "precision": "bfloat16"}
    half = make_plan(recipe(folder, prompts, **call), GPU)
    own = make_plan(recipe(folder, prompts, **call, memory={"vae_precision": "float32"}), GPU)
    assert own.memory.parts["vae"] == 2 * half.memory.parts["vae"]
    assert own.memory.parts["transformer"] == half.memory.parts["transformer"]
    assert own.memory.phases["rollout"] > half.memory.phases["rollout"]
    assert not own.memory.notes


def test_a_row_with_a_size_of_its_own_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "red dog", "height": 32}')
    with pytest.raises(UserError, match=r"height = 32.*rollout\.call\.height"):
        make_plan(recipe("pocket", file), GPU)


def test_without_tokenizers_sizes_are_still_there(tmp_path: Path, prompts: Path) -> None:
    folder = saved("sd3", tmp_path / "sd3")
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.rmtree(folder / name)
    made = make_plan(recipe(str(folder), prompts, rollout={"steps": 3, "call": CALLS["sd3"]}), GPU)
    assert made.trained > 0 and made.memory.phases == {}
    assert "activations are not counted" in str(made)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rollout": {"guidance_scale": 2.0, "steps": 3}, "train": {"micro_batch": 3}},
        pytest.param(
            {"algorithm": {"kl": 0.0, "clip": None}, "train": {"micro_batch": 4}},
            marks=pytest.mark.slow,
        ),
        pytest.param({"algorithm": {"name": "diffusion_dpo"}}, marks=pytest.mark.slow),
        pytest.param({"algorithm": {"name": "diffusion_nft"}}, marks=pytest.mark.slow),
        {"algorithm": {"name": "awm"}, "train": {"inner_epochs": 2}},
        {"algorithm": {"name": "flow_grpo"}, "rollout": {"guidance_scale": 2.0, "steps": 4}},
    ],
)
def test_passes_are_those_of_the_run(
    changes: dict[str, Any], tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    light(monkeypatch)
    folder = saved("sd3", tmp_path / "sd3", weights=True)
    one = {"iterations": 1, "lr": 1e-2}
    changes = {**changes, "train": {**one, **changes.get("train", {})}}
    call = {"height": 16, "width": 16, "max_sequence_length": 8}
    changes["rollout"] = {"steps": 3, **changes.get("rollout", {}), "call": call}
    name = changes.get("algorithm", {}).get("name", "dgpo")
    if name != "flow_grpo":
        own = {"timesteps": {"count": 2, "indices": [0, 2]}}
        changes["algorithm"] = {**own, **changes.get("algorithm", {})}
    else:
        changes["algorithm"] = {"name": name, "updates": 1}
    given = {"rewards": {"brightness": 1.0}, "prompts": {"train": str(prompts)}}
    base = {k: v for k, v in settings().items() if k != "algorithm"}
    plain = Recipe.from_dict(
        {**base, **given, **changes, "model": str(folder), "run": {"dir": str(tmp_path / "run")}}
    )
    planned = make_plan(plain, GPU).counts
    Trainer(recipe=plain).train()
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["groups_dropped"] == 0
    assert row["images"] == planned.images
    assert row["forwards"] == planned.forwards
    assert row["backwards"] == planned.backward


def test_the_command_prints_it(prompts: Path) -> None:
    asked = ["plan", "pocket-geneval", "train.micro_batch=16", "eval.limit=10"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    for text in ("StableDiffusion3Pipeline", "8 groups of 16", "LoRA of rank 32", "peak"):
        assert text in result.output, result.output
    refused = CliRunner().invoke(app, [*asked, "--memory", "0.001"])
    assert refused.exit_code == 2 and "largest part" in refused.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"targets": ["to_kk"]}}, r"lora\.targets: .*'to_kk'.*to_k"),
        ({"rollout": {"call": {"height": 50, "width": 48}}}, r"rollout\.call: .*height=50"),
        ({"rollout": {"scheduler": "ddim"}}, r"rollout\.scheduler: 'ddim'"),
        ({"rollout": {"sde": {"kind": "ddim"}}}, r"rollout\.sde"),
        ({"eval": {"scheduler": "ddim"}}, r"eval\.scheduler: 'ddim'"),
        (
            {"memory": {"free_text_encoders": True}, "model": "families.audio:ace_step"},
            r"memory\.free_text_encoders: AceStepPipeline is given the text at every call",
        ),
        ({"rollout": {"call": {"hight": 16}}}, r"rollout\.call\.hight.*height"),
        ({"prompts": {"train": "nowhere.txt"}}, r"nowhere\.txt"),
        ({"model": "nowhere"}, "nowhere"),
        ({"rollout": {"guidance_scale": 2.0}, "model": "families.audio:ace_step"}, "remembers"),
        (
            {"train": {"sharding": "fsdp2"}, "model": "families.audio:ace_step"},
            r"train\.sharding = 'fsdp2': AceStepPipeline is given one text a call",
        ),
    ],
)
def test_what_cannot_be_is_one_error(
    changes: dict[str, Any], message: str, tmp_path: Path, prompts: Path
) -> None:
    model = changes.get("model") or str(saved("sd3", tmp_path / "sd3"))
    call = changes.get("rollout", {}).get("call", {} if "model" in changes else CALLS["sd3"])
    changes = {**changes, "model": model}
    changes["rollout"] = {"steps": 3, **changes.get("rollout", {}), "call": call}
    if "lora" in changes:
        changes["lora"] = {"rank": 4, "alpha": 8, **changes["lora"]}
    with pytest.raises(UserError, match=message):
        make_plan(recipe(rows=prompts, **changes), GPU)


def test_a_row_that_names_another_reward_is_refused(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "red dog", "rewards": ["rednes"]}')
    with pytest.raises(UserError, match=r"'red dog'.*rednes.*brightness"):
        make_plan(recipe("families.tiny:sd3_small", rows), GPU)


def test_groups_that_were_ranked_before_are_not_sampled(tmp_path: Path, prompts: Path) -> None:
    writer = GroupWriter(tmp_path / "groups")
    for text in WORDS:
        writer.add(text, [Image.new("RGB", (16, 16), color) for color in ("red", "blue")], [0, 1])
    given: dict[str, Any] = {
        "data": {"preferences": str(tmp_path / "groups")},
        "group_size": 2,
        "rollout": {"steps": 3, "call": {"height": 16, "width": 16}},
    }
    made = make_plan(recipe("families.tiny:sd3_small", prompts, **given), GPU)
    assert made.counts.rollout == 0 and "rollout" not in made.memory.phases
    assert made.counts.backward == 2 * 2 * 2 and "groups of 2, ranked before" in str(made)
    with pytest.raises(UserError, match=r"group 1 .* has 2 pictures and group_size = 3"):
        make_plan(recipe("families.tiny:sd3_small", prompts, **{**given, "group_size": 3}), GPU)


def test_peaks_are_those_of_tensors_that_live_together() -> None:
    def chain() -> torch.Tensor:
        x = torch.empty(1000, device="meta")
        for _ in range(5):
            x = x + 1
        return x

    assert needs(chain).memory == 2 * 4000

    def kept() -> None:
        layer = torch.empty(100, 100, device="meta", requires_grad=True)
        x = torch.empty(10, 100, device="meta")
        for _ in range(3):
            x = torch.relu(x @ layer)
        x.sum().backward()

    # x, and of each layer what relu keeps; at backward gradients of the weight
    assert 40000 + 4 * 4000 <= needs(kept).memory <= 4 * 40000 + 8 * 4000


class Block(nn.Module):
    """Two products, of which one is trained; it counts how often it is run."""

    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(64, 64, device="meta").requires_grad_(False)
        self.trained = nn.Linear(64, 64, device="meta")

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        Block.runs += 1
        return torch.relu(self.trained(self.frozen(x) * scale)) + x, scale


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("graph", [False, True])
def test_equal_blocks_are_run_once_and_need_the_same(graph: bool, again: bool) -> None:
    class Net(nn.Module):
        def __init__(self, told: bool) -> None:
            super().__init__()
            blocks = [Block() for _ in range(6)]
            self.blocks = nn.ModuleList(blocks) if told else nn.Sequential(*blocks)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = torch.empty(1, 64, device="meta")
            for block in self.blocks:
                made: Any = (checkpoint(block, x, scale, use_reentrant=False)
                             if again else block(x, scale))  # fmt: skip
                x, scale = made
            return x

    found = []
    for told in (False, True):
        net, Block.runs = Net(told), 0

        def train(net: Net = net) -> None:
            with torch.set_grad_enabled(graph):
                made = net(torch.empty(1000, 64, device="meta"))
            if graph:
                made.sum().backward()

        found.append(needs(train))
        gradients = [parameter.grad is not None for parameter in net.parameters()]
        assert gradients == ([False, False, True, True] * 6 if graph else [False] * 24)
        # the first has an input without a gradient; checkpoints run each block once more
        assert Block.runs == ((2 if graph else 1) if told else 6 * (1 + (graph and again)))
    assert found[0].flops == found[1].flops
    assert found[1].memory == pytest.approx(found[0].memory, rel=0.01)


@pytest.mark.parametrize("again", [False, True])
def test_attention_holds_no_matrix_of_weights(again: bool) -> None:
    def block(q: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q)

    def attend() -> None:
        q = torch.empty(1, 1, 4096, 8, device="meta", requires_grad=True)
        made = checkpoint(block, q, use_reentrant=False) if again else block(q)
        assert isinstance(made, torch.Tensor)
        made.sum().backward()

    own = nn.functional.scaled_dot_product_attention
    assert needs(attend).memory < 4096 * 4096
    assert nn.functional.scaled_dot_product_attention is own


def test_checkpointing_holds_less(prompts: Path, tmp_path: Path) -> None:
    folder = str(saved("sd3", tmp_path / "sd3"))
    needs = []
    for again in (False, True):
        memory = {"gradient_checkpointing": again}
        rollout = {"steps": 3, "call": CALLS["sd3"]}
        made = make_plan(recipe(folder, prompts, rollout=rollout, memory=memory), GPU).memory
        assert not made.notes
        needs.append(made.phases["training"])
    assert needs[1] < 0.8 * needs[0]


def test_calls_of_the_denoiser_are_those_of_the_schedule() -> None:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        PNDMScheduler,
    )

    assert calls_of(FlowMatchEulerDiscreteScheduler(), 7) == 7
    assert calls_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 7) == 7
    assert calls_of(FlowMatchHeunDiscreteScheduler(), 7) == 13
    assert calls_of(PNDMScheduler(skip_prk_steps=True), 7) == 8
    assert calls_of(FlowMatchEulerDiscreteScheduler(), 7, strength=0.5) == 3


@pytest.mark.parametrize("strength", [0.5, None])
def test_a_part_of_the_noise_is_a_part_of_the_steps(strength: float | None, tmp_path: Path) -> None:
    """Image to image: what is planned is what a rollout of the real pipeline takes."""
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "red dog", "image": "one.png"}\n')
    folder = str(saved("sd15_img2img", tmp_path / "model", weights=True))
    call = {} if strength is None else {"strength": strength}
    model = PipelineModel(load_pipeline(folder, "float32"), call=call)
    cond = model.encode([load_prompts(str(rows))[0].text], guidance=False)
    taken = model.rollout(cond, steps=6, generators=[torch.Generator()], decode=False).levels
    planned = make_plan(recipe(folder, rows, rollout={"steps": 6, "call": call}), GPU)
    assert planned.counts.rollout == planned.counts.images * len(taken)
