"""core is mathematics: it may import torch, pydantic, the standard library and itself."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import dgpo.core

FOLDER = Path(dgpo.core.__file__).parent
ALLOWED = {"torch", "pydantic", *sys.stdlib_module_names}


def imported(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {"." * node.level + (node.module or "")}
    return names


def forbidden(source: str) -> set[str]:
    def fine(name: str) -> bool:
        ours = name == "dgpo.errors" or f"{name}.".startswith("dgpo.core.")
        return ours or name.split(".")[0] in ALLOWED

    return {name for name in imported(source) if not fine(name)}


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.name)
def test_core_imports_nothing_else(path):
    assert forbidden(path.read_text()) == set()


def test_errors_imports_the_standard_library_alone():
    names = imported((FOLDER.parent / "errors.py").read_text())
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)


def test_the_check_itself_finds_what_is_not_allowed():
    source = "import torch.nn\nfrom dgpo.models import x\ndef f():\n    import diffusers"
    assert forbidden(source) == {"dgpo.models", "diffusers"}
    assert forbidden("from dgpo import core") == {"dgpo"}
