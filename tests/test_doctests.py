"""The examples in the docstrings of the package are run as they stand."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import dgpo

ROOT = Path(dgpo.__file__).parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FLOOR = 30
"""How many modules have examples at least, so that they are not lost unnoticed."""


def _name(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


WITH_EXAMPLES = [_name(f) for f in sorted(ROOT.rglob("*.py")) if ">>> " in f.read_text("utf-8")]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_print_what_they_say(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert found.attempted and not found.failed


def test_many_modules_have_examples() -> None:
    assert len(WITH_EXAMPLES) >= FLOOR
