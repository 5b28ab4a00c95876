"""Arrows point down: a room imports those below it alone, wherever in a file the import stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.architecture import PAGE, ROOMS, SOURCE, House, circles, main, reduced, with_section

HOUSE = House(SOURCE)


@pytest.mark.parametrize("module", HOUSE.files)
def test_imports_point_down(module: str) -> None:
    assert HOUSE.room(module)  # it stands in a room
    assert [line for line in HOUSE.upward if line.startswith(f"{module} ")] == []


def test_no_files_import_each_other() -> None:
    assert HOUSE.circles == []


def test_every_room_is_there() -> None:
    assert {HOUSE.room(module) for module in HOUSE.files} >= set(ROOMS)


def test_the_picture_and_the_table_are_those_of_the_source(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err
    assert f"{len(ROOMS)} rooms" in capsys.readouterr().out


def test_the_files_that_the_page_names_are_there() -> None:
    named = re.findall(r"`([\w/]+\.py)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 5
    for place in named:
        assert (SOURCE / place).is_file() or (SOURCE.parents[1] / place).is_file(), place


@pytest.fixture
def other(tmp_path: Path) -> House:
    """A package of two rooms in which the lower one imports the upper."""
    for place, text in {
        "__init__.py": "from pack.high import a\n",
        "low/__init__.py": "",
        "low/a.py": "def f():\n    from pack.high import a\n",
        "low/b.py": "from typing import *\nif TYPE_CHECKING:\n    from pack import high\n",
        "high/__init__.py": "",
        "high/a.py": "import pack.low.a\nfrom pack.low import b\nimport json\n",
        "high/deep/c.py": "from . import d\nfrom ..a import x\n",
        "high/deep/d.py": "from ...low.b import y\nimport pack.low.c_is_not_there\n",
    }.items():
        file = tmp_path / "pack" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return House(tmp_path / "pack", ("low", "high"))


def test_imports_are_found_wherever_they_stand(other: House) -> None:
    assert other.imports["pack.low.a"] == {"pack.high.a"}
    assert other.imports["pack.low.b"] == {"pack.high"} and other.loaded["pack.low.b"] == set()
    assert other.imports["pack.high.a"] == {"pack.low.a", "pack.low.b"}
    assert other.imports["pack.high.deep.c"] == {"pack.high.deep.d", "pack.high.a"}
    assert other.imports["pack.high.deep.d"] == {"pack.low.b"}
    assert other.upward == [
        "pack.low.a imports pack.high.a: high stands above low",
        "pack.low.b imports pack.high: high stands above low",
    ]
    assert other.circles == [["pack.high.a", "pack.low.a"]]
    assert "2 upward, 1 circles" in other.figures


def test_a_file_in_no_room_is_told(other: House) -> None:
    (other.source / "new.py").write_text("")
    with pytest.raises(ValueError, match=r"pack\.new stands in no room: add it to ROOMS"):
        House(other.source, other.rooms).room("pack.new")


def test_the_smaller_room_is_meant() -> None:
    assert HOUSE.room("dgpo.models.samplers.schedulers") == "models/samplers"
    assert HOUSE.room("dgpo.models.policy") == HOUSE.room("dgpo.models") == "models"
    assert HOUSE.room("dgpo.rewards.shipped.clip") == "rewards/shipped"


def test_circles_and_implied_arrows() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": set()}
    assert circles(graph) == [["d", "e"], ["a", "b", "c"]]
    assert reduced({"a": {"b", "c", "d"}, "b": {"c"}, "c": set(), "d": {"c"}}) == {
        "a": {"b", "d"}, "b": {"c"}, "c": set(), "d": {"c"},
    }  # fmt: skip


def test_a_part_of_a_page_is_replaced_and_the_rest_kept() -> None:
    page = "a\n<!-- table: x -->\nold\n<!-- end -->\nb\n<!-- table: y -->\n<!-- end -->\n"
    assert with_section(page, "x", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="table: z"):
        with_section(page, "z", "new")
