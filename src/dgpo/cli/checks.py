"""Cheap checks, which commands make before they import what takes seconds.

A recipe's validation needs torch; nothing else here does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgpo.errors import UserError
from dgpo.recipe.files import apply_overrides, find_recipe, read_recipe
from dgpo.registry import PROMPTS, known, unknown

if TYPE_CHECKING:
    from dgpo.prompts import Prompt
    from dgpo.recipe import Recipe


def load_recipe(name: str, overrides: Sequence[str] | None) -> Recipe:
    """Load a recipe and check the files that it names.

    Raises:
        UserError: the recipe is wrong, or a prompt file or the folder of groups cannot be read.
    """
    check_sources(apply_overrides(read_recipe(find_recipe(name)), overrides or []))
    from dgpo.recipe import Recipe

    return Recipe.load(name, overrides or [])


def check_sources(recipe: Mapping[str, Any]) -> None:
    """Refuse a recipe whose prompt files or folder of groups cannot be read.

    Args:
        recipe: nested dicts, which need not be valid: validation says what is wrong with them.

    Raises:
        UserError: the message names the file or folder.
    """
    from dgpo.preferences import FILE, read_groups

    ranked = _text(recipe, "data", "preferences")
    if ranked is None:
        check_prompts(_text(recipe, "prompts", "train"))
    elif not (Path(ranked) / FILE).is_file():
        read_groups(ranked)  # it says what is missing
    check_prompts(_text(recipe, "prompts", "eval"))


def _text(recipe: Mapping[str, Any], section: str, key: str) -> str | None:
    found = recipe.get(section)
    value = found.get(key) if isinstance(found, Mapping) else None
    return value if isinstance(value, str) else None


def check_prompts(source: str | None) -> None:
    """Refuse a prompt file that cannot be read; sets that code makes are left for later.

    Raises:
        UserError: the file does not exist, is empty, or has a broken row.
    """
    if source is not None and source not in PROMPTS and ":" not in source:
        from dgpo.prompts import load_prompts

        load_prompts(source)


def check_rewards(names: Iterable[str]) -> None:
    """Refuse names that no reward has.

    Raises:
        UserError: the message names the nearest rewards.
    """
    for name in names:
        if not known("reward", name):
            raise UserError(unknown("reward", name))


def check_lora(given: Path | None) -> None:
    """Refuse a LoRA that does not exist.

    Raises:
        UserError: there is no such file or folder.
    """
    if given is not None and not given.exists():
        raise UserError(f"--lora {given}: there is none; give a file, a run or a checkpoint")


def check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written in, before its files cost compute.

    Raises:
        UserError: something on the way to it is a file, or must not be written in.
    """
    _check_place(f"{option} {folder}", folder)


def check_file(option: str, file: Path | None) -> None:
    """Refuse a file that cannot be written, in the same way.

    Raises:
        UserError: it is a folder, it must not be written, or its folder cannot be made.
    """
    if file is None:
        return
    if file.is_dir():
        raise UserError(f"{option} {file}: it is a folder; name a file in it")
    _check_place(f"{option} {file}", file.parent)
    if file.exists() and not os.access(file, os.W_OK):
        raise UserError(f"{option} {file}: you may not write this file")


def _check_place(given: str, folder: Path) -> None:
    place = folder.absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{given}: {str(there)!r} is a file, and a folder is needed there")
    if not os.access(there, os.W_OK):
        raise UserError(f"{given}: you may not write in the folder {str(there)!r}")


def prompt_rows(prompt: list[str], more: list[str], source: str | None) -> list[Prompt]:
    """Return the rows of --prompt or of --prompts, whichever was given.

    Raises:
        UserError: neither or both were given, or the rows cannot be read.
    """
    from dgpo.prompts import load_prompts

    if len(prompt) > 1 and more:
        raise UserError(f"{more[0]!r}: write --prompt before each text, or once before all texts")
    if more and not prompt:
        raise UserError(f"{more[0]!r}: write --prompt before the text")
    texts = [*prompt, *more]
    if bool(texts) == (source is not None):
        raise UserError("give either --prompt TEXT (once or more) or --prompts FILE")
    return load_prompts(source if source is not None else texts)
