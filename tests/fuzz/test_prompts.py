"""Prompt files of any content: rows, or one clear error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo.prompts import load_prompts
from dgpo.registry import PROMPTS
from dgpo.rewards import load_rewards
from fuzz.parts import PROFILE, VALUES, changed_bytes, value_or_error

GOOD = b"".join(
    json.dumps(row).encode() + b"\r\n"
    for row in (
        {"prompt": "a photo of two dogs", "tag": "counting", "include": [{"class": "dog"}]},
        {"prompt": 'a sign that says "Öl"', "text": "Öl", "seed": 3, "rewards": ["redness"]},
        {"prompt": "edit", "image": "a.png", "rewards": {"brightness": 0.5}},
    )
)
LINES = st.lists(
    st.dictionaries(
        st.sampled_from(["prompt", "image", "mask", "rewards", "seed", "include"]) | st.text(),
        VALUES,
        max_size=4,
    ).map(lambda row: json.dumps(row).encode())
    | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")),
    max_size=4,
).map(b"\n".join)
ENCODED = st.tuples(st.text(), st.sampled_from(["utf-8-sig", "utf-16", "latin-1", "utf-32"])).map(
    lambda pair: pair[0].encode(pair[1], "replace")
)


@PROFILE
@given(
    suffix=st.sampled_from([".txt", ".jsonl"]),
    content=st.binary(max_size=200) | changed_bytes(GOOD) | LINES | ENCODED,
)
def test_files(suffix: str, content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / f"prompts{suffix}"
    file.write_bytes(content)
    rows = value_or_error(lambda: load_prompts(file))
    if rows is None:
        return
    assert rows and all(row.text.strip() for row in rows)
    assert all(isinstance(row.text.encode("utf-8"), bytes) for row in rows)
    # what a row says of rewards is looked at before anything is made
    rewards = load_rewards(["redness", "brightness"])
    value_or_error(lambda: rewards.check(rows))


@PROFILE
@given(rows=VALUES | st.lists(VALUES | st.fixed_dictionaries({"prompt": VALUES}), max_size=3))
def test_rows(rows: Any) -> None:
    if isinstance(rows, str):
        return  # a name or a file
    found = value_or_error(lambda: load_prompts(rows))
    assert found is None or all(row.text.strip() for row in found)


@PROFILE
@given(name=st.text(max_size=30) | st.sampled_from(["datasets:", ":", "x:", ":x", "..:x", "a/b"]))
def test_names(name: str) -> None:
    there = name in PROMPTS or Path(name.replace("\0", "")).exists()
    assert there or value_or_error(lambda: load_prompts(name)) is None
