"""The examples in docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import dgpo

ROOT = Path(dgpo.__file__).parent
WITH_EXAMPLES = [
    ".".join(["dgpo", *file.relative_to(ROOT).with_suffix("").parts])
    for room in ("models", "distributed", "check")
    for file in sorted((ROOT / room).rglob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0 and found.failed == 0


def test_what_users_call_has_examples() -> None:
    assert {
        "dgpo.models.load",
        "dgpo.models.pipeline.adapter",
        "dgpo.models.pipeline.self_check",
        "dgpo.models.samplers.schedulers",
        "dgpo.models.weights.lora",
    } <= set(WITH_EXAMPLES)
