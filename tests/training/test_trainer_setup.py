"""What a run looks at before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dgpo.errors import UserError
from dgpo.training import setup
from families.tiny import sd3_small
from tiny_runs import trainer


@pytest.mark.parametrize(
    ("settings", "checked"),
    [
        ({"rollout": {"scheduler": "dpmsolver++"}}, {"DPMSolverMultistepScheduler"}),
        (
            {"rollout": {"sde": {"kind": "cps"}}},
            {"FlowMatchEulerDiscreteScheduler", "FlowMatchSdeScheduler"},
        ),
        (
            {"rollout": {"scheduler": "unipc"}, "eval": {"scheduler": "heun"}},
            {"UniPCMultistepScheduler", "FlowMatchHeunDiscreteScheduler"},
        ),
    ],
)
def test_the_samplers_of_the_run_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], checked: set[str]
) -> None:
    seen: set[str] = set()
    check = setup.self_check

    def noted(*given: Any) -> Any:
        assert given[-1] == 3  # the steps of the run
        report = check(*given)
        seen.update(point.sampler for point in report.points)
        return report

    monkeypatch.setattr(setup, "self_check", noted)
    trainer(tmp_path, **settings)
    assert seen == checked


def test_guidance_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="changes nothing in StableDiffusion3"):
        trainer(tmp_path, rollout={"guidance_scale": 0.5})


@pytest.mark.parametrize("given", ["train_dataset", "eval_dataset"])
def test_a_row_with_a_size_of_its_own_is_refused(tmp_path: Path, given: str) -> None:
    rows = {given: [{"prompt": "red dog", "width": 32}]}
    with pytest.raises(UserError, match=r"width = 32.*rollout\.call\.width \(now 16\)"):
        trainer(tmp_path, **rows)


def test_the_vae_has_the_precision_of_the_recipe(tmp_path: Path) -> None:
    how = {"precision": "bfloat16", "memory": {"vae_precision": "float32"}}
    run = trainer(tmp_path, model="families.tiny:sd3_small", **how)
    pipe = run.model.pipe
    assert pipe.vae.dtype == torch.float32 and pipe.text_encoder.dtype == torch.bfloat16
    given = sd3_small().to(torch.bfloat16)
    with pytest.raises(UserError, match=r"memory\.vae_precision = 'float32'.*bfloat16"):
        trainer(tmp_path / "given", model=given, **how)
