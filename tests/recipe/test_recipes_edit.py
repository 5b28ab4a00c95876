"""The recipes whose prompts speak of pictures: planned and trained on tiny pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from dgpo import Recipe, Trainer
from dgpo.errors import UserError
from dgpo.planning import Machine, make_plan
from dgpo.rewards.shipped.vlm_judge import VLMJudge
from families.edit import picture
from families.tiny import TINY, build
from tiny_runs import light

TINIES = {"kontext-edit": "flux_kontext", "style-sd35m": "sd3"}
PAIRS = [("red dog", picture()), ("blue house", ImageOps.mirror(picture()))]


def overrides(name: str, folder: Path) -> list[str]:
    rows = []
    for number, (text, image) in enumerate(PAIRS):
        image.save(folder / f"{number}.png")
        rows.append(json.dumps({"prompt": text, "image": f"{number}.png"}))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    build(TINIES[name]).save_pretrained(folder / "model")
    return [
        f"model={folder / 'model'}",
        f"prompts={{train: {folder / 'rows.jsonl'}, eval: {folder / 'rows.jsonl'}}}",
        f"rollout.call={json.dumps(TINY[TINIES[name]].call)}",
        f"memory.prompt_cache={folder / 'cache'}",
        "precision=float32",
        "group_size=2",
        "groups_per_iteration=2",
        "train.iterations=1",
        "samples.count=0",
        f"run.dir={folder / 'run'}",
    ]


@pytest.mark.parametrize("name", TINIES)
def test_it_can_be_planned(name: str, tmp_path: Path) -> None:
    plan = make_plan(Recipe.load(name, overrides(name, tmp_path)), Machine("cuda"))
    assert plan.counts.images == 4 and plan.memory.phases["training"] > 0
    assert not plan.memory.notes
    own = plan.memory.parts.get("rewards", 0)  # a judge lies elsewhere, and CLIP here
    assert own == (428e6 * 4 if "clip" in plan.recipe.rewards else 0)


@pytest.mark.parametrize("name", TINIES)
def test_it_trains_and_the_judge_sees_both_pictures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    light(monkeypatch)
    sources = {text: image.tobytes() for text, image in PAIRS}
    asked: list[str] = []

    def judge(
        self: Any, client: Any, model: str, row: int, pictures: list[Image.Image], text: str
    ) -> float:
        source, made = pictures
        assert source.tobytes() == sources[text] and made.size == (32, 32)
        asked.append(text)
        return float(len(asked) % 7)

    monkeypatch.setattr(VLMJudge, "_score", judge)
    monkeypatch.setattr(VLMJudge, "_setting", lambda self, place, what: "http://127.0.0.1:9")
    recipe = Recipe.load(name, overrides(name, tmp_path))
    (key,) = [key for key, term in recipe.rewards.items() if key != "clip"]
    check = VLMJudge.check
    monkeypatch.setattr(VLMJudge, "check", lambda self, prompts: None)
    data = recipe.to_dict()
    data["rewards"] = {key: data["rewards"][key]}
    trainer = Trainer(recipe=Recipe.from_dict(data))
    trainer.train()
    assert set(asked) == set(sources) and len(asked) >= 4
    assert list((tmp_path / "run" / "lora").glob("*.safetensors"))
    monkeypatch.setattr(VLMJudge, "check", check)
    with pytest.raises(UserError, match=r"line 1 .*no picture there"):
        VLMJudge("http://127.0.0.1:9", "m", sources=["mask"]).check(trainer.prompts)
