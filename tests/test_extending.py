"""docs/extending.md: every block is a whole file, and every line that it says to run runs."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from commands import run
from dgpo.registry import MODELS, Entry
from tiny_runs import light, rows

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


class Block(NamedTuple):
    section: str
    language: str
    text: str

    @property
    def file(self) -> str:
        """The name in the first line, of which the rest of the block is the content."""
        return self.text.partition("\n")[0].removeprefix("# ")


def blocks() -> list[Block]:
    found, section = [], ""
    pattern = re.compile(r"^## ([^\n]+)$|^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for match in pattern.finditer(PAGE.read_text(encoding="utf-8")):
        section = match[1] or section
        if match[2]:
            found.append(Block(section, match[2], match[3]))
    return found


BLOCKS = blocks()
SECTIONS = ["A reward", "A reward with a model", "An algorithm", "A callback", "A logger",
            "A sampler", "A model"]  # fmt: skip
LEFT = {
    "A reward": ["runs/reward/lora", "stripes/pytorch_lora_weights.safetensors"],
    "A callback": ["runs/plateau/newest.png"],
    "A logger": ["runs/lines/lines.txt", "runs/lines/train.csv"],
}
"""What the blocks of a section leave behind, beside the rows of their runs."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all files of the page, from which modules are imported anew."""
    for block in BLOCKS:
        if block.language != "sh":
            (tmp_path / block.file).write_text(block.text)
    light(monkeypatch)
    # the blocks run on a tiny SD3 instead; only my_model.py makes the pocket itself
    monkeypatch.setitem(MODELS, "pocket", Entry("families.tiny:sd3_small"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yours = {Path(block.file).stem for block in BLOCKS if block.language == "python"}
    for name in yours & set(sys.modules):
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_every_block_is_tried() -> None:
    assert {block.language for block in BLOCKS} == {"yaml", "python", "sh"}
    assert list(dict.fromkeys(block.section for block in BLOCKS)) == ["", *SECTIONS]
    for block in BLOCKS:
        if block.language != "sh":
            assert re.fullmatch(r"\w+\.(py|yaml)", block.file), block


@pytest.mark.parametrize("section", SECTIONS)
def test_the_blocks_run(section: str, place: Path) -> None:
    own = [block for block in BLOCKS if block.section == section]
    for block in own:
        if block.language == "python":
            runpy.run_path(block.file, run_name="__main__")
        for line in block.text.splitlines() if block.language == "sh" else ():
            program, *words = shlex.split(line)
            assert program == "dgpo"
            run(*words)
            (folder,) = [word.removeprefix("run.dir=") for word in words if "run.dir=" in word]
            logged = rows(place / folder)
            assert len(logged) == 2 and all(row["grad_norm"] > 0 for row in logged)
    assert any(block.language == "sh" for block in own)
    for file in LEFT.get(section, ()):
        assert (place / file).exists(), file


def test_the_scheduler_of_the_page_is_the_one_that_runs(place: Path) -> None:
    from dgpo import load_pocket
    from dgpo.models.samplers.schedulers import make_scheduler

    made = make_scheduler("my_sampler.py:Fine", load_pocket().scheduler)
    made.set_timesteps(4)
    assert made.sigmas.tolist() == sorted(made.sigmas.tolist(), reverse=True)
    assert float(made.sigmas[1]) < 0.8
