"""Any pipeline of diffusers can be trained: every question of `dgpo check`, of every family.

The quick tests ask a few families; ``make test-all`` asks all. Each family is examined once.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from dgpo.check.compatibility import QUESTIONS
from dgpo.models.pipeline import families
from families.table import examined, row
from families.tiny import TINY

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FAMILIES = [
    pytest.param(name, marks=() if tiny.fast else pytest.mark.slow) for name, tiny in TINY.items()
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answer_is_yes_or_a_refusal_that_says_why(name: str, question: str) -> None:
    answer, tiny = examined(name).answers[question], TINY[name]
    if tiny.refused is not None:
        assert answer.verdict == "refused" and tiny.refused in answer.note
    elif question in tiny.without:
        assert answer.verdict == "none", answer
    elif question == "SDE" and tiny.no_sde is not None:
        assert answer.verdict == "refused" and tiny.no_sde in answer.note
    else:
        assert answer.verdict == "yes", answer


@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_says_so(name: str) -> None:
    assert row(name) in PAGE.read_text(encoding="utf-8").splitlines()


def test_no_override_of_a_family_is_longer_than_four_lines() -> None:
    tree = ast.parse(inspect.getsource(families))
    tables = [node.value for node in tree.body if isinstance(node, ast.AnnAssign)]
    (table,) = [value for value in tables if isinstance(value, ast.Dict)]
    entries = [value for value in table.values if isinstance(value, ast.Call)]
    assert len(entries) == len(families.FAMILIES) > 0
    assert all(1 + (entry.end_lineno or 0) - entry.lineno <= 4 for entry in entries)


def test_the_fast_families_cover_both_kinds_of_denoiser_and_all_processes() -> None:
    fast = [name for name, tiny in TINY.items() if tiny.fast]
    assert {examined(name).process for name in fast} == {"FlowMatching", "Epsilon", "VPrediction"}
    assert {"sd15", "wan"} <= set(fast)
