"""`dgpo eval` by several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distributed.together import all_well, alone, evaluate


def test_each_prompt_counts_once_and_one_process_speaks(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    alone(evaluate, one, one)
    all_well(2, evaluate, two, two)
    scored = [(folder / "scored.txt").read_text().splitlines() for folder in (one, two)]
    assert sorted(scored[0]) == sorted(scored[1]) == [f"{n} red dog" for n in range(5)]
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (one, two))
    assert second["n"] == 5 and second.keys() == first.keys()
    assert second["overall"] == pytest.approx(first["overall"], abs=1e-6)
    assert second["rewards"] == pytest.approx(first["rewards"], abs=1e-6)
    printed = [(two / f"printed-{rank}.txt").read_text() for rank in range(2)]
    assert printed[0].count("dogs: ") == 1 and "5 pictures" in printed[0]
    assert "written to" in printed[0] and printed[1] == ""
