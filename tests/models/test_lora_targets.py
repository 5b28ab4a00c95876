"""Which layers ``lora.targets`` means, and that a run says what ``auto`` has found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgpo.errors import UserError
from dgpo.models.load import load_pipeline
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.models.weights.lora import JOINT_ATTENTION, fitting_targets
from dgpo.recipe import Recipe
from dgpo.recipe.sections import LoraSettings
from dgpo.trainer import Trainer
from families.tiny import sd3_small, tiny_model
from tiny_runs import light, settings, trainer, without_times

EIGHT = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
]
"""What the default was before there was ``auto``; published runs train these."""
NAMED = {"rank": 4, "alpha": 12, "targets": EIGHT}


def policy(pipe: Any, **lora: Any) -> Policy:
    return Policy(PipelineModel(pipe), LoraSettings(**lora))


def weights(trained: Policy) -> dict[str, Tensor]:
    return trained.state_dict()


@pytest.mark.parametrize("model", ["pocket", "tiny SD3"])
def test_auto_is_the_lora_of_the_published_layers_bit_for_bit(model: str) -> None:
    def make() -> Any:
        return sd3_small() if model == "tiny SD3" else load_pipeline(model)

    found, named = policy(make()), policy(make(), targets=EIGHT)
    assert found.targets == named.targets == list(JOINT_ATTENTION) == EIGHT
    one, other = weights(found), weights(named)
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_missing_projection_is_enough_to_look_for_others() -> None:
    attention = nn.Module()
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        attention.add_module(name, nn.Linear(2, 2))
    denoiser = nn.Module()
    denoiser.add_module("attn", attention)
    assert fitting_targets({"transformer": denoiser}) == ["to_q", "to_k", "to_v"]
    attention.add_module("to_out", nn.ModuleList([nn.Linear(2, 2)]))
    assert fitting_targets({"transformer": denoiser}) == EIGHT


def test_where_nothing_fits_the_layers_are_named() -> None:
    denoiser = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"lora\.targets: .*to_q.*the first are 0$"):
        fitting_targets({"transformer": denoiser})


def test_a_list_is_taken_as_it_is() -> None:
    named = policy(sd3_small(), targets=["attn.to_v", "attn.to_q"])
    assert named.targets == ["attn.to_v", "attn.to_q"] and named.news == []


def test_two_experts_have_the_layers_of_one_rule() -> None:
    model = tiny_model("wan22")
    Policy(model, LoraSettings(rank=2, alpha=4))
    adapted = {
        name: {n for n, p in denoiser.named_parameters() if p.requires_grad}
        for name, denoiser in model.denoisers.items()
    }
    assert adapted["transformer"] and adapted["transformer"] == adapted["transformer_2"]


def test_recipes_say_auto_and_old_ones_keep_their_lists() -> None:
    assert Recipe().to_dict()["lora"]["targets"] == "auto"
    old = Recipe.from_dict({"lora": NAMED})
    assert old.lora is not None and old.lora.targets == EIGHT
    assert Recipe.from_dict(old.to_dict()) == old


@pytest.mark.parametrize("given", [[], "to_q", [1], None, "Auto"])
def test_anything_else_is_refused_in_one_line(given: Any) -> None:
    with pytest.raises(UserError, match=r"^recipe: lora\.targets = .*auto, or a list.*to_q") as it:
        Recipe.from_dict({"lora": {"targets": given}})
    assert "\n" not in str(it.value)


@pytest.mark.parametrize("first", ["named", "auto"])
def test_a_run_goes_on_by_either(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    light(monkeypatch)
    save = {"checkpoint": {"every": 1}}
    lora = [{"lora": NAMED}, {}] if first == "named" else [{}, {"lora": NAMED}]
    through = trainer(tmp_path / "through", train={"iterations": 2, "lr": 1e-2}, **save)
    through.train()
    trainer(tmp_path / "run", train={"iterations": 1, "lr": 1e-2}, **save, **lora[0]).train()
    again = trainer(tmp_path / "run", resume=True, **save, **lora[1])
    again.train()
    one, other = weights(through.policy), weights(again.policy)
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert without_times(tmp_path / "through") == without_times(tmp_path / "run")


def test_a_unet_trains_without_a_layer_being_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    light(monkeypatch)
    recipe = {
        **settings(rollout={"steps": 3, "call": {}}, run={"dir": str(tmp_path / "run")}),
        "lora": {"rank": 4},
        "train": {"iterations": 1},
    }
    run = Trainer("pocket-sd", "redness", ["a", "b"], recipe=recipe)
    run.train()
    said = [line for line in capsys.readouterr().err.splitlines() if "lora.targets: auto" in line]
    assert len(said) == 1
    assert f"{len(run.policy.passes.layers)} layers: to_q, to_k, to_v, to_out.0" in said[0]
