"""The tables of docs that come from the registry are those of the source."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgpo import registry
from tools import docs_tables
from tools.docs_tables import DOCS, TABLES, pages, table


@pytest.fixture(scope="module")
def written() -> dict[Path, str]:
    return pages()


@pytest.mark.parametrize("page", sorted({page for page, _ in TABLES.values()}))
def test_the_page_is_what_the_registry_says(page: str, written: dict[Path, str]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert text == written[DOCS / page], "run: make docs-tables"


def test_every_table_of_the_pages_is_made_by_a_program() -> None:
    for page in DOCS.glob("*.md"):
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("<!-- table: "):
                name = line.removeprefix("<!-- table: ").removesuffix(" -->")
                assert name == "rooms" or TABLES[name][0] == page.name


def test_every_name_has_a_row() -> None:
    for kind, make in (
        ("algorithm", docs_tables.algorithms),
        ("reward", docs_tables.rewards),
        ("model", docs_tables.models),
    ):
        text = make()
        for name, entry in registry.TABLES[kind].items():
            assert f"\n| `{name}` | {entry.about} |" in text


def test_a_table_of_markdown() -> None:
    assert table(("a", "b"), [["x|y", ""], ["", "z"]]) == (
        "| a | b |\n|---|---|\n| x\\|y | |\n| | z |"
    )
