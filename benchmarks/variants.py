"""Variants of one recipe, each with a few settings changed, as recipes for a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from dgpo.comparison.figures import Figure, Summary
from dgpo.comparison.table import Table, cell
from dgpo.errors import UserError
from dgpo.recipe import Recipe
from dgpo.recipe.files import apply_overrides, find_recipe, read_recipe
from dgpo.settings import Settings


class Variant(Settings):
    what: str
    """What differs, in words."""
    set: list[str] = Field(default_factory=list)
    """The settings that differ, ``a.b=c``."""


class Variants(Settings):
    title: str = "Ablations"
    """Of the table."""
    section: str = "ablations"
    """The part of the page that holds it; see :func:`put_section`."""
    base: str
    """A recipe's name or file."""
    targets: list[float] = Field(default_factory=list)
    """Held-out scores: the table says how long each variant took to reach them."""
    offline_groups: int = Field(default=0, ge=0)
    """How many groups are sampled from the untrained model, for variants that ask for them."""
    variants: dict[str, Variant]

    def folder(self, out: Path) -> Path:
        """Where those groups lie."""
        return out / "groups"


def read_variants(file: str | Path) -> Variants:
    """Read a file of variants.

    Raises:
        UserError: it cannot be read, or is no such file.
    """
    try:
        return Variants.model_validate(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise UserError(f"{file}: these are no variants of a recipe: {error}") from error


def write_recipes(variants: Variants, out: Path) -> list[str]:
    """Write ``recipes/NAME.yaml`` for each variant, and prove that each is a valid recipe.

    Raises:
        UserError: a setting is wrong, or a variant differs in nothing from the base.
    """
    base = read_recipe(find_recipe(variants.base))
    place = out / "recipes"
    place.mkdir(parents=True, exist_ok=True)
    files, seen = [], {}
    for name, variant in variants.variants.items():
        overrides = [one.replace("{groups}", str(variants.folder(out))) for one in variant.set]
        recipe = Recipe.from_dict(apply_overrides(base, overrides), f"variant {name}")
        twin = next((other for other, its in seen.items() if its == recipe), None)
        if twin is not None:
            raise UserError(f"variant {name}: its settings are those of {twin}")
        seen[name] = recipe
        data = {**recipe.to_dict()}
        del data["run"]
        text = f"# {variant.what}: {' '.join(overrides) or variants.base}\n"
        text += yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        (place / f"{name}.yaml").write_text(text, encoding="utf-8")
        files.append(str(place / f"{name}.yaml"))
    return files


def table(
    variants: Mapping[str, Variant], summaries: Sequence[Summary], metric: str, title: str
) -> Table:
    """What each variant has reached, how soon it reached the comparison's targets, and what it cost
    out of the domain of what is trained."""
    others = list(dict.fromkeys(name for summary in summaries for name in summary.change))
    header = ["variant", "training minutes", "iterations", f"best {metric}"]
    targets = list(summaries[0].to_target)
    header += [f"{what} to {target:g}" for target in targets for what in ("iterations", "minutes")]
    header += [f"change of {name}" for name in others]
    rows = []
    for summary in summaries:
        ends = [run.points[-1] for run in summary.records]
        spent = _range([end.cost["minutes"] or 0.0 for end in ends], ".1f")
        made = _range([end.iteration for end in ends], "d")
        changes = [cell(summary.change.get(name, Figure(None)), 3, sign=True) for name in others]
        name = f"{summary.name}: {variants[summary.name].what}"
        times: list[str] = []
        for target, costs in summary.to_target.items():
            times += [_iterations(summary, target), cell(costs["minutes"])]
        rows.append([name, spent, made, cell(summary.best, 3), *times, *changes])
    return Table(title, header, rows)


def _iterations(summary: Summary, target: float) -> str:
    """Those that it took, from the fastest seed to the slowest; at least so many if one failed."""
    there = [run.arrival(target) for run in summary.records]
    if any(point is None for point in there):
        return f">= {min(run.points[-1].iteration for run in summary.records)}"
    return _range([point.iteration for point in there if point is not None], "d")


def _range(values: Sequence[Any], form: str) -> str:
    low, high = (format(end, form) for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def put_section(file: Path, name: str, text: str, title: str) -> None:
    """Write a part of a page between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``; what is
    around it stays. A page without the marks gets them at its end.

    Args:
        file: the page; made if it is not there.
        name: of the part.
        text: what goes between the marks.
        title: of a new page.

    Raises:
        UserError: one of the marks is missing, or they are there twice.
    """
    begin, end = (f"<!-- {name}: {what} -->" for what in ("begin", "end"))
    page = file.read_text(encoding="utf-8") if file.exists() else f"# {title}\n"
    if begin not in page and end not in page:
        page = f"{page.rstrip()}\n\n{begin}\n{end}\n"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise UserError(f"{file}: {begin} and {end} must stand in it once each, in this order")
    before, _, rest = page.partition(begin)
    after = rest.partition(end)[2]
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = f"{before}{begin}\n{text.strip()}\n{end}{after}"
    file.write_text(whole, encoding="utf-8")
