"""Variants of a recipe: what make ablations compares, and the part of the page that it writes."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from benchmark_files import BENCHMARKS, benchmark
from benchmarks.variants import put_section, read_variants, write_recipes
from dgpo.comparison.plan import protocol
from dgpo.errors import UserError
from dgpo.recipe import Recipe
from tiny_runs import PROMPTS, light, settings


def test_the_ablations_are_one_change_each_and_comparable(tmp_path: Path) -> None:
    variants = read_variants(BENCHMARKS / "ablations.yaml")
    files = write_recipes(variants, tmp_path)
    recipes = {Path(file).stem: Recipe.load(file) for file in files}
    base = recipes["dgpo"]
    assert base.to_dict() | {"run": {}} == Recipe.load(variants.base).to_dict() | {"run": {}}
    assert variants.base == "pocket-geneval-turbo"
    assert all(protocol(recipe) == protocol(base) for recipe in recipes.values())
    sizes = {recipe.group_size for recipe in recipes.values()}
    assert sizes == {4, 8, 16, 24}
    made = {recipe.images_per_iteration for recipe in recipes.values()}
    assert made == {128, 120}
    changed = {
        name: _differing(recipe.to_dict(), base.to_dict()) for name, recipe in recipes.items()
    }
    assert changed["euler-rollouts"] == {"rollout.scheduler", "eval.scheduler"}
    assert changed["sde-rollouts"] == {"rollout.sde", "rollout.scheduler", "eval.scheduler"}
    assert changed["no-timestep-clip"] == {"algorithm.timesteps.indices"}
    assert changed["uniform-weights"] == {"algorithm.sample_weights"}
    assert changed["own-noise"] == {"algorithm.shared_noise"}
    assert changed["offline"] == {"data.preferences"}
    assert changed["ema-reference"] == {"algorithm.reference", "algorithm.beta"}
    assert recipes["offline-pairs"].algorithm.name == "diffusion_dpo"
    assert recipes["offline-pairs"].data == recipes["offline"].data


def test_the_turbo_without_each_of_its_changes(tmp_path: Path) -> None:
    variants = read_variants(BENCHMARKS / "turbo.yaml")
    recipes = {Path(f).stem: Recipe.load(f) for f in write_recipes(variants, tmp_path)}
    base = recipes.pop("turbo")
    turbo = Recipe.load("pocket-geneval-turbo").to_dict()
    assert base.to_dict() | {"run": {}} == turbo | {"run": {}}
    assert all(protocol(recipe) == protocol(base) for recipe in recipes.values())
    assert variants.section != read_variants(BENCHMARKS / "ablations.yaml").section
    changed = {name: _differing(r.to_dict(), base.to_dict()) for name, r in recipes.items()}
    assert changed["unguided"] == {"rollout.guidance_scale", "eval.guidance_scale"}
    assert changed["cold-average"] == {"ema.warmup"}


def _differing(one: dict, other: dict, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key in one.keys() | other.keys():
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys |= _differing(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.add(prefix + key)
    return {key for key in keys if not key.startswith("run.")}


def test_wrong_variants_are_refused(tmp_path: Path) -> None:
    def written(**variants: list[str]) -> Path:
        body = {name: {"what": name, "set": changes} for name, changes in variants.items()}
        file = tmp_path / "variants.yaml"
        file.write_text(yaml.safe_dump({"base": "pocket-geneval", "variants": body}))
        return file

    with pytest.raises(UserError, match="variant b: its settings are those of a"):
        write_recipes(read_variants(written(a=[], b=["group_size=16"])), tmp_path)
    with pytest.raises(UserError, match=r"variant a.*group_size"):
        write_recipes(read_variants(written(a=["group_size=1"])), tmp_path)
    (tmp_path / "odd.yaml").write_text("base: 3")
    with pytest.raises(UserError, match=r"odd.yaml: these are no variants"):
        read_variants(tmp_path / "odd.yaml")


def test_a_part_of_a_page_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "results.md"
    put_section(page, "ablations", "one", "Results")
    first = page.read_text()
    assert first == "# Results\n\n<!-- ablations: begin -->\none\n<!-- ablations: end -->\n"
    page.write_text(f"above\n{first}below\n")
    put_section(page, "ablations", "two\n", "Results")
    assert page.read_text() == f"above\n{first}below\n".replace("one", "two")
    put_section(page, "other", "three", "Results")
    assert "two" in page.read_text() and "three" in page.read_text()
    page.write_text(page.read_text().replace("<!-- other: end -->", ""))
    with pytest.raises(UserError, match="must stand in it once each"):
        put_section(page, "other", "four", "Results")


def test_the_ablations_run_and_are_resumable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As make ablations, of a tiny recipe: one iteration each, and nothing the second time."""
    light(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    recipe = settings(
        model="families.tiny:sd3_small",
        rewards={"brightness": 1.0},
        prompts={"train": "prompts.txt", "eval": "prompts.txt"},
        train={"iterations": 1},
        eval={"at_start": True, "metrics": ["brightness", "redness"]},
    )
    recipe["algorithm"]["timesteps"] = {"count": 1, "indices": [0, 2]}
    Path("base.yaml").write_text(yaml.safe_dump(recipe))
    variants = {
        "plain": {"what": "as it is"},
        "offline": {"what": "nothing sampled", "set": ["data.preferences={groups}"]},
    }
    spec = {"targets": [0.01, 0.99], "base": "base.yaml", "offline_groups": 2, "variants": variants}
    Path("variants.yaml").write_text(yaml.safe_dump(spec))
    module = benchmark("ablations")
    words = ["--variants", "variants.yaml", "--out", "out", "--page", "results.md"]
    words += ["--results", "kept"]
    monkeypatch.setattr(sys, "argv", ["ablations.py", *words])
    module.main()
    page = Path("results.md").read_text()
    # minutes, iterations, score; iterations and minutes to each target
    costs = r"\| plain: as it is \| \d+\.\d \| 1 \| 0\.\d+ \| 0 \| 0\.00 \| >= 1 \| >= 0\.0"
    assert re.search(costs, page)
    assert "| iterations to 0.01 | minutes to 0.01 | iterations to 0.99 |" in page
    assert "| offline: nothing sampled |" in page
    assert "change of redness" in page and "--variants variants.yaml" in page
    files = {file: file.stat().st_mtime_ns for file in Path("out").rglob("checkpoints/*/*")}
    assert len(files) == 6
    capsys.readouterr()
    module.main()
    assert capsys.readouterr().out.count("found finished") == 2
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert Path("results.md").read_text() == page
    shutil.rmtree("out")
    monkeypatch.setattr(sys, "argv", ["ablations.py", *words, "--redraw"])
    module.main()
    again = Path("results.md").read_text()
    assert _rows(again) == _rows(page) and len(_rows(page)) == 4
    assert not list(Path("out").rglob("checkpoints"))


def _rows(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith("|")]
