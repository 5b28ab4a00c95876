"""FSDP2: the denoiser in pieces gives the update, the checkpoint and the model of the whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel

from dgpo.distributed.processes import SINGLE, Processes
from dgpo.distributed.sharding import shard, sums_in
from dgpo.errors import UserError
from dgpo.models.pipeline.arguments import denoisers_of
from dgpo.prompts.caption import Caption
from dgpo.recipe import Recipe
from dgpo.rewards.shipped.stand_in import brightness
from dgpo.training.agreement import place, refuse_unshardable
from distributed import together
from distributed.together import (
    all_well,
    alone,
    apart,
    check_figures,
    run,
    train,
    train_ragged,
    weights,
)
from families.audio import stable_audio
from families.edit import picture
from families.tiny import build, sd3_small
from tiny_runs import settings

SHARDED: dict[str, Any] = {"train": {"sharding": "fsdp2"}}
LORA: dict[str, Any] = {"lora": {"rank": 4, "alpha": 12}}
ON_COGVIEW = {"rank": 4, "alpha": 12, "targets": ["to_q", "to_v"]}


@pytest.mark.parametrize("name", ["dgpo", pytest.param("flow_grpo", marks=pytest.mark.slow)])
def test_all_weights_in_pieces(name: str, tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    few = {"groups_per_iteration": 2, "rollout": {"batch": 4}}
    alone(train, whole, whole, name, few)
    all_well(2, train, pieces, pieces, name, {**few, **SHARDED})
    off = apart(whole, pieces)
    print(f"{name}, all weights in two pieces: {off:.1e}")  # docs/scaling.md quotes it
    assert off < 1e-5
    model = SD3Transformer2DModel.from_pretrained(pieces / "model" / "transformer")
    slow = weights(whole)
    for name_, weight in model.named_parameters():
        assert torch.allclose(weight, slow[f"slow.transformer.{name_}"].to(weight), atol=1e-5)


@pytest.mark.slow
def test_gradients_in_pieces_are_summed_once_for_a_step(tmp_path: Path) -> None:
    """Or after every micro-batch, with the same update."""
    few = {"groups_per_iteration": 2, "rollout": {"batch": 4}, "reward": brightness}
    sums = {}
    for how in ("step", "micro_batch"):
        changes = {**few, "train": {"sharding": "fsdp2", "sum_gradients": how, "micro_batch": 2}}
        place = tmp_path / how
        all_well(2, together.counted, place, place, "dgpo", changes, "foreach_reduce")
        units, sums[how] = json.loads((place / "counts.json").read_text())
    assert apart(tmp_path / "step", tmp_path / "micro_batch") < 1e-12
    # two iterations of one step; two levels of three micro-batches of at most five pictures
    assert sums["step"] == [units] * 2 and sums["micro_batch"] == [2 * 3 * units] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "how"),
    [(4, {"sharding_size": 2}), (2, {"sharding_offload": True})],
    ids=["two copies in two pieces each", "pieces on the CPU"],
)
def test_pieces_in_other_places(processes: int, how: dict[str, Any], tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    few = {"groups_per_iteration": 4, "rollout": {"batch": 4}}
    alone(train, whole, whole, "dgpo", few)
    changes = {**few, "train": {"sharding": "fsdp2", **how}}
    all_well(processes, train, pieces, pieces, "dgpo", changes)
    off = apart(whole, pieces)
    print(f"all weights, {how}: {off:.1e}")  # docs/scaling.md quotes it
    assert off < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharding_size", "none"])
def test_all_weights_in_half_precision(name: str, tmp_path: Path) -> None:
    """By two processes, with whole weights or in pieces: the gradient of the first step."""
    whole, two = tmp_path / "whole", tmp_path / "two"
    # of four groups of five the micro-batches are alike, and what each of them rounds
    changes = {"groups_per_iteration": 4, "precision": "bfloat16", "dtype": torch.bfloat16}
    train_ = {"iterations": 1, **({} if name == "none" else {"sharding": "fsdp2", name: 2})}
    alone(train, whole, whole, "dgpo", {**changes, "train": {"iterations": 1}})
    all_well(2, train, two, two, "dgpo", {**changes, "train": train_})
    one, other = weights(whole), weights(two)
    assert one.keys() == other.keys()
    assert {tensor.dtype for tensor in (*one.values(), *other.values())} == {torch.float32}
    moments = [key for key in one if key.endswith("exp_avg")]
    off = sum(float((one[key] - other[key]).square().sum()) for key in moments) ** 0.5
    off /= sum(float(one[key].square().sum()) for key in moments) ** 0.5
    print(f"bfloat16, sharding {name}: {off:.1e}")  # docs/scaling.md quotes it
    # FSDP2 rounds the sum of a gradient to the precision of its weight, by 2^-8 at most
    assert off < (1e-6 if name == "none" else 2**-8)


@pytest.mark.slow
@pytest.mark.parametrize("later", [SHARDED, {}], ids=["in pieces", "whole"])
def test_pieces_go_on(later: dict[str, Any], tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    alone(train, whole, whole, "dgpo")
    half = {"train": {"sharding": "fsdp2", "iterations": 1}}
    all_well(2, train, pieces, pieces, "dgpo", half)
    all_well(2, train, pieces, pieces, "dgpo", {**later, "resume": True})
    assert apart(whole, pieces) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dgpo", "flow_grpo", "crd"])
def test_a_lora_on_a_frozen_base_in_pieces(name: str, tmp_path: Path) -> None:
    """The LoRA is float32, whole in each process, and not merged where the base is sharded."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    alone(train, whole, whole, name, LORA)
    all_well(2, train, pieces, pieces, name, {**LORA, **SHARDED})
    off = apart(whole, pieces)
    print(f"{name}, a LoRA on a base in two pieces: {off:.1e}")  # docs/scaling.md quotes it
    assert off < 1e-5
    check_figures(whole, pieces, 1e-3, counts=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_frozen_base_is_gathered_once_for_an_update(dtype: torch.dtype, tmp_path: Path) -> None:
    """Instead of twice or thrice for every micro-batch, with the same update."""
    changes = {**LORA, "groups_per_iteration": 2, "reward": brightness, "dtype": dtype}
    gathers = {}
    for reshard in (True, False):
        train_ = {"sharding": "fsdp2", "reshard": reshard, "micro_batch": 2}
        place = tmp_path / str(reshard)
        given = {**changes, "train": train_}
        all_well(2, together.counted, place, place, "dgpo", given, "foreach_all_gather")
        units, gathers[reshard] = json.loads((place / "counts.json").read_text())
    print(f"gathers of an update, of {units} units: {gathers}")  # docs/scaling.md quotes it
    assert apart(tmp_path / "True", tmp_path / "False") == 0
    assert gathers[False] == [units] * 2
    # two levels of three micro-batches: the policy, the reference, and the blocks at backward
    assert all(count >= 2 * 3 * (3 * units - 1) for count in gathers[True])


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, ON_COGVIEW], ids=["all weights", "a LoRA"])
def test_prompts_of_different_length_without_a_mask(lora: Any, tmp_path: Path) -> None:
    """A process whose prompts have one length makes a pass for nothing beside one that has two."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    alone(train_ragged, whole, whole, {"lora": lora})
    all_well(2, train_ragged, pieces, pieces, {"lora": lora, **SHARDED})
    one, two = weights(whole), weights(pieces)
    gradients = [name for name in one if name.endswith("exp_avg")]  # the first step's, averaged
    largest = max(float(one[name].abs().max()) for name in gradients)
    off = max(float((one[name] - two[name]).abs().max()) for name in gradients) / largest
    print(f"prompts of two lengths, lora {lora}: {off:.1e}")  # docs/scaling.md quotes it
    assert largest > 0 and off < 1e-5
    check_figures(whole, pieces, 1e-4, counts=False)
    asked = [json.loads((pieces / f"lengths-{rank}.json").read_text()) for rank in range(2)]
    assert len(asked[0]) == len(asked[1]) and [len(set(lengths)) for lengths in asked] == [1, 2]


def test_pipelines_that_are_given_the_text_at_every_call_are_refused(tmp_path: Path) -> None:
    pipe = stable_audio()
    recipe = Recipe.from_dict(settings(lora=None, **SHARDED))
    with pytest.raises(UserError, match="StableAudioPipeline is given one text a call"):
        place(pipe, denoisers_of(pipe), recipe, SINGLE, True)


def test_pictures_are_refused_where_the_pipeline_takes_them() -> None:
    text = Caption("red dog", {"image": picture()})
    recipe = Recipe.from_dict(settings(**SHARDED))
    with pytest.raises(UserError, match="FluxKontextPipeline makes as many passes"):
        refuse_unshardable(recipe, build("flux_kontext"), [text])
    refuse_unshardable(recipe, build("flux_kontext"), [str(text)])
    refuse_unshardable(recipe, sd3_small(), [text])  # a reward alone sees it


def test_one_process_has_nothing_to_shard(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.sharding = 'fsdp2'.*torchrun"):
        run(tmp_path, "dgpo", **SHARDED)


def test_sizes_that_do_not_divide_the_processes_are_refused() -> None:
    recipe = Recipe.from_dict(settings(train={"sharding": "fsdp2", "sharding_size": 3}))
    with pytest.raises(UserError, match=r"train\.sharding_size = 3: 4 processes cannot"):
        shard({}, Processes(0, 4), torch.device("cpu"), recipe.train)


def test_weights_of_two_precisions_are_refused() -> None:
    denoiser = sd3_small().transformer.bfloat16().requires_grad_(True)
    denoiser.proj_out.float()
    with pytest.raises(UserError, match=r"transformer are torch\.bfloat16 and torch\.float32"):
        sums_in("transformer", denoiser)
