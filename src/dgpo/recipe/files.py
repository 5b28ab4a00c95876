"""Find and read recipe files. Nothing heavy is imported, so that ``dgpo list recipes`` is quick."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dgpo.errors import UserError
from dgpo.recipe.plain_yaml import parse_yaml, refuse_unwritable
from dgpo.registry import nearest
from dgpo.secrets import masked, masked_words

PACKAGED = Path(__file__).parents[1] / "recipes"
"""The recipes that are installed with the package."""
_SUFFIXES = (".yaml", ".yml")
MANIFEST = "run.json"
"""The file of a run folder that holds the versions, seeds, machine and command of its starts."""
DEEPEST = 16
"""The most parts that the dotted key of an override may have."""
TEXTS = (
    *("model", "prompts.train", "prompts.eval", "data.preferences", "memory.prompt_cache"),
    *("rollout.scheduler", "eval.scheduler", "run.dir", "run.name"),
    "compute.attention",
)
"""The keys of a recipe whose values are texts: their overrides are not read as YAML."""


def recipe_names() -> dict[str, Path]:
    """Return the recipes that have a name: those in ``./recipes``, and the packaged ones."""
    found: dict[str, Path] = {}
    for folder in (PACKAGED, Path("recipes")):
        for file in sorted(folder.glob("*.yaml")):
            found[file.stem] = file
    return dict(sorted(found.items()))


def summary(file: Path) -> str:
    """Return the first comment line of a recipe, which says what it is."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def find_recipe(path_or_name: str | Path) -> Path:
    """Return the file that a path or a recipe's name (with or without ``.yaml``) stands for.

    The manifest of a run stands for the recipe beside it.

    Raises:
        UserError: there is no such file or name, or a manifest lies there without its recipe.
    """
    path = Path(path_or_name)
    try:
        if path.is_file():
            return _recipe_of_run(path) if is_manifest(path) else path
    except (OSError, ValueError) as error:  # no file can have this name
        raise UserError(f"recipe {str(path_or_name)!r:.200}: {error}") from error
    names = recipe_names()
    stem = path.stem if path.suffix in _SUFFIXES else path.name
    if stem in names and path.parent in (Path("."), Path("recipes")):
        return names[stem]
    what = "is a folder" if path.is_dir() else "is neither a file nor a recipe"
    raise UserError(
        f"recipe {str(path_or_name)!r} {what}{nearest(stem, names)}; "
        f"recipes: {', '.join(names) or 'none'}"
    )


def is_manifest(path_or_name: str | Path) -> bool:
    """Return whether a name is the ``run.json`` of a run folder, or the ``NAME-run.json`` that
    ``dgpo compare --results`` keeps."""
    name = Path(path_or_name).name
    return name == MANIFEST or name.endswith(f"-{MANIFEST}")


def _recipe_of_run(manifest: Path) -> Path:
    file = manifest.with_name(manifest.name.removesuffix(MANIFEST) + "recipe.yaml")
    if not file.is_file():
        raise UserError(
            f"{str(manifest)!r}: the recipe of the run, {file.name}, is not beside it; put it "
            "there, or give a recipe"
        )
    return file


def resumed(recipe: str, words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the recipe and the overrides of ``dgpo train RECIPE --resume [RUN]``.

    The run alone is enough, since its folder holds its recipe.

    Raises:
        UserError: a folder that was named holds no run.
    """
    if is_manifest(recipe):
        raise UserError(
            f"{recipe!r} repeats its run in a new folder: leave out --resume. To go on with it "
            f"instead: dgpo train {Path(recipe).parent} --resume"
        )
    folders = [word for word in words if "=" not in word or _is_run(Path(word))]
    overrides = [word for word in words if word not in folders]
    if Path(recipe).is_dir():
        folders = [recipe, *folders]
        recipe = str(Path(recipe) / "recipe.yaml")
    if folders:
        folders += [w.partition("=")[2] for w in overrides if w.partition("=")[0] == "run.dir"]
    if len(folders) > 1:
        raise UserError(f"--resume goes on with one run, got {' and '.join(folders)}")
    for folder in folders:
        if not _is_run(Path(folder)):
            raise UserError(f"--resume {folder}: this folder holds no run (no recipe.yaml)")
        overrides.append(override("run.dir", folder))
    return recipe, overrides


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file()


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file as plain nested dicts, without validating them.

    The recipe of a run belongs to the folder that it lies in, wherever the run began: copied or
    moved, it goes on there.

    Raises:
        UserError: the file cannot be read, or is not a mapping in YAML and UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: cannot be read: {error}") from error
    data = parse_yaml(text, f"recipe {path}")
    if data is None:
        raise UserError(f"recipe {path} is empty")
    if not isinstance(data, dict):
        raise UserError(f"recipe {path} holds a {type(data).__name__}, not keys and values")
    run = data.get("run") or {}
    if isinstance(run, dict) and _lies_in_run(path):
        return {**data, "run": {**run, "dir": str(path.parent)}}
    return data


def _lies_in_run(file: Path) -> bool:
    folder = file.parent
    written = [folder / MANIFEST, folder / "metrics.jsonl", *folder.glob("checkpoints/[0-9]*")]
    return file.name == "recipe.yaml" and any(path.exists() for path in written)


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy with dotted keys set by ``a.b=c``.

    The value is YAML; that of a key in :data:`TEXTS` is the text as it stands, unless it is quoted
    or null.

    Raises:
        UserError: an override has no ``=`` or a broken value, or sets a key below a plain value.

    >>> apply_overrides({"train": {"lr": 1}}, ["train.lr=3e-4", "seed=7"])
    {'train': {'lr': 0.0003}, 'seed': 7}
    >>> apply_overrides({}, ["run.dir=runs/a #2"])
    {'run': {'dir': 'runs/a #2'}}
    """
    for item in overrides:
        key, equals, value = item.partition("=")
        path, shown = key.strip().split("."), masked_words([item])[0]
        if not equals or not all(path) or len(path) > DEEPEST:
            raise UserError(f"override {shown!r} is not KEY=VALUE, for example train.lr=1e-4")
        data = _set(data, path, _value(key.strip(), value, f"override {shown!r}"), key.strip())
    return data


def override(key: str, value: Any) -> str:
    """Return ``key=value`` for :func:`apply_overrides`, quoted where it would be read otherwise."""
    with suppress(UserError):  # what cannot be read as it stands is quoted
        if isinstance(value, str) and not _quoted(value) and _value(key, value, key) == value:
            return f"{key}={value}"
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _value(key: str, value: str, where: str) -> Any:
    text = value.strip(" \t\r\n")
    if key not in TEXTS or _quoted(text) or text in ("", "~", "null"):
        return parse_yaml(value, where)
    refuse_unwritable(text, where)
    return text


def _quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"


def _set(data: Any, path: list[str], value: Any, key: str) -> dict[str, Any]:
    if isinstance(data, str) and key.startswith("algorithm."):
        data = {"name": data}  # `algorithm: dgpo` is short for `algorithm: {name: dgpo}`
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(
            f"override {key}: it cannot be set, since what is above it is the value "
            f"{masked(data)!r}"
        )
    head, *rest = path
    return {**data, head: _set(data.get(head), rest, value, key) if rest else value}
