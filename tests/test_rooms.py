"""Arrows point down: a room imports those below it alone, wherever in a file the import stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dgpo

ROOT = Path(dgpo.__file__).parent
ORDER = [
    "errors",
    "secrets",
    "interrupts",
    "disk",
    "settings",
    "registry",
    "reserved",
    "reward_facts",
    "media",
    "core",
    "pocket",
    "prompts",
    "preferences",
    "algorithms",
    "distributed",
    "models",
    "rewards",
    "recipe",
    "serve",
    "ranking",
    "evaluation",
    "rollouts",
    "generators",
    "run",
    "training",
    "trainer",
    "check",
    "planning",
    "comparison",
    "cli",
]


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dgpo."):
            yield node.module or ""


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    own = file.relative_to(ROOT).with_suffix("").parts[0]
    if own.startswith("__"):
        return
    for module in _imports(file):
        other = module.split(".")[1]
        assert ORDER.index(other) <= ORDER.index(own), f"{own} imports {module}"
