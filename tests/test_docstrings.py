"""Every public name has a docstring that begins with a whole sentence."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dgpo

ROOT = Path(dgpo.__file__).parent
# ``__main__`` is the command itself: importing it runs it
FILES = [file for file in sorted(ROOT.rglob("*.py")) if file.name != "__main__.py"]
FRAGMENT = re.compile(r"\s*(Of|As|That|Whether)\b")
FRAGMENT_OF_AN_ARGUMENT = re.compile(r"^ +[\w, ]+: (of|as|that) ", re.MULTILINE)
SENTENCE = re.compile(r"[.!?](\s|$)")


def _module(file: Path) -> Any:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))


def _public(module: Any) -> Iterator[tuple[str, Any]]:
    yield module.__name__, module
    for name, value in vars(module).items():
        ours = getattr(value, "__module__", "") == module.__name__
        if name.startswith("_") or not ours or not hasattr(value, "__qualname__"):
            continue
        yield f"{module.__name__}.{name}", value
        for part in vars(value) if inspect.isclass(value) else ():
            member = inspect.getattr_static(value, part)
            told = inspect.isroutine(member) or isinstance(member, property)
            field = part in inspect.get_annotations(value)  # a default that is a function
            if told and not field and not part.startswith("_"):
                yield f"{module.__name__}.{name}.{part}", getattr(value, part)


def _problem(doc: str | None) -> str | None:
    if not doc:
        return "has no docstring"
    if FRAGMENT.match(doc):
        return f"begins with a fragment: {doc[:60]!r}"
    first = doc.split("\n\n")[0]
    return None if SENTENCE.search(first) else f"does not begin with a sentence: {first[:60]!r}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_public_names_say_what_they_are(file: Path) -> None:
    told = {name: _problem(inspect.getdoc(value)) for name, value in _public(_module(file))}
    assert not [f"{name} {problem}" for name, problem in told.items() if problem]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_text_is_a_fragment(file: Path) -> None:
    """Also the texts below attributes and in ``Args`` are more than ``Of the run.``"""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = str(node.value.value)
            assert not FRAGMENT.match(text), text
            assert not FRAGMENT_OF_AN_ARGUMENT.search(text), text


@pytest.mark.parametrize(
    ("doc", "problem"),
    [
        (None, "no docstring"),
        ("Of the run.", "fragment"),
        ("Whether it fits.", "fragment"),
        ("A title\n\nA sentence.", "sentence"),
        ("Return the mean: ``[B] -> []``.", None),
        ("Offload the networks.", None),
    ],
)
def test_the_check_itself(doc: str | None, problem: str | None) -> None:
    found = _problem(doc)
    assert problem in (found or "") if problem else found is None
