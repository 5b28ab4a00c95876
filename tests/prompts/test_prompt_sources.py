"""Prompt files as they come: encodings, duplicates, many rows, tables, and the generators."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from commands import run
from dgpo.errors import UserError
from dgpo.generators import GENERATORS, make_rows, write_rows
from dgpo.generators.geneval import one, plural
from dgpo.pocket.prompts import held_out
from dgpo.prompts import Prompt, PromptSampler, load_prompts
from dgpo.rewards.shipped.geneval_judge import CLASSES, check_row
from dgpo.rewards.shipped.ocr import wanted_text

PUBLISHED = [
    {"tag": "counting", "include": [{"class": "clock", "count": 2}],
     "exclude": [{"class": "clock", "count": 3}], "prompt": "a photo of two clocks"},
    {"tag": "position", "include": [
        {"class": "bear", "count": 1},
        {"class": "clock", "count": 1, "position": ["left of", 0]},
    ], "prompt": "a photo of a clock left of a bear"},
]  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_byte_order_mark_says_how_a_file_is_read(tmp_path: Path, encoding: str) -> None:
    text = "café über alles\r\n\r\n猫 and 犬\r\n"
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    (tmp_path / "p.txt").write_bytes((mark + text).encode(encoding))
    assert load_prompts(tmp_path / "p.txt") == [Prompt("café über alles"), Prompt("猫 and 犬")]
    row = json.dumps({"prompt": "猫", "tag": "é"}, ensure_ascii=False)
    (tmp_path / "p.jsonl").write_bytes(f"{mark}\r\n{row}".encode(encoding))
    assert load_prompts(tmp_path / "p.jsonl") == [Prompt("猫", {"tag": "é"})]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfea", ["UTF-16"]),
        (b'\xef\xbb\xbf{"prompt": "a"}\n\xc3(', ["line 2", "UTF-8"]),
        (b'{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}', ["line 2", "'prompt'", "twice"]),
        (b'{"prompt": "a", "n": NaN}', ["line 1", "NaN"]),
        (b"[" * 100_000, ["line 1", "deep"]),
        (b'{"prompt": "\\ud83d"}', ["line 1", "half a character"]),
        (b'\n\n{"prompt": "a", "n": ' + b"9" * 5000 + b"}", ["line 3"]),
        (b'{"prompt": "a", "image": "~nobody-of-this-name/x.png"}', ["line 1", "'image'"]),
        (b'{"prompt": "a", "image": "' + b"x" * 5000 + b'"}', ["line 1", "'image'"]),
    ],
)
def test_what_no_row_can_be_is_refused_with_its_line(
    tmp_path: Path, content: bytes, words: list[str]
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_prompts(file)
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value)) < 6000


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("x" * 5000, "does not exist"),
        ("os:sep", "not a function"),
        ("os:getcwd", "row 0"),
        ("json:loads", "raised TypeError"),
        ("datasets:", "not a set"),
        ("datasets:x?splt=train", "unknown option 'splt'.*'split'"),
        (7, "holds no rows"),
    ],
)
def test_sources_that_are_none(source: Any, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if source == "os:getcwd":
        monkeypatch.setattr("os.getcwd", lambda: [3])
    with pytest.raises(UserError, match=word):
        load_prompts(source)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.txt").symlink_to("p.txt")
    with pytest.raises(UserError, match=r"p\.txt"):
        load_prompts(tmp_path / "p.txt")


def test_duplicates_count_twice(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a\nb\na\n")
    prompts = load_prompts(file)
    assert [p.text for p in prompts] == ["a", "b", "a"]
    seen = [p.text for i in range(4) for p in PromptSampler(prompts, 3, 0).at(i)]
    assert seen.count("a") == 8 and seen.count("b") == 4


def test_a_hundred_thousand_rows_come_in_order(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    count = 100_000
    with file.open("w") as stream:
        stream.writelines(f'{{"prompt": "cat {i % 70000}", "seed": {i}}}\n' for i in range(count))
        stream.write('{"prompt": 3}\n')
    with pytest.raises(UserError, match=r"line 100001: 'prompt' must be a text"):
        load_prompts(file)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - len('{"prompt": 3}\n'))
    prompts = load_prompts(file)
    assert len(prompts) == count and prompts[-1] == Prompt("cat 29999", {"seed": 99999})
    sampler = PromptSampler(prompts, per_iteration=1000, seed=1)
    seen = {p.metadata["seed"] for i in range(100) for p in sampler.at(i)}
    assert len(seen) == count


def test_published_metadata_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, PUBLISHED)))
    rows = load_prompts(file)
    assert [{**row.metadata, "prompt": row.text} for row in rows] == PUBLISHED
    for row in rows:
        check_row(row.metadata["include"], row.metadata.get("exclude"))
    quoted = tmp_path / "train.txt"
    quoted.write_text('A wall with "Keep Out" on it\n')
    assert wanted_text("ocr", "row 0", load_prompts(quoted)[0].text) == "Keep Out"


def test_tables_of_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    clauses = [{"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1}]
    rows = [{"caption": "a", "text": None, "include": clauses}, {"caption": "b", "text": "7"}]
    wanted = [Prompt("a", {"include": clauses}), Prompt("b", {"text": "7"})]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(str(tmp_path / "disk"))
    datasets.DatasetDict({"validation": table}).save_to_disk(str(tmp_path / "splits"))
    table.to_parquet(str(tmp_path / "t.parquet"))
    for source in ("disk?", "splits?split=validation&", "t.parquet?"):
        assert load_prompts(f"datasets:{tmp_path}/{source}column=caption") == wanted
    assert load_prompts(table.rename_column("caption", "prompt")) == wanted
    for source, words in (
        ("disk", r"no column 'prompt'.*column=caption"),
        ("splits?split=test&column=caption", "splits"),
        ("nothing.parquet", "nothing"),
    ):
        with pytest.raises(UserError, match=words):
            load_prompts(f"datasets:{tmp_path}/{source}")


def test_a_table_that_brings_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="prompts datasets:"):
        load_prompts(f"datasets:{tmp_path / 'evil'}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", GENERATORS)
def test_generated_rows_are_different_and_follow_the_seed(kind: str) -> None:
    rows = make_rows(kind, 300, seed=5)
    assert len({row["prompt"] for row in rows}) == 300
    assert make_rows(kind, 120, seed=5) == rows[:120]
    assert make_rows(kind, 300, seed=6) != rows
    left = make_rows(kind, 50, seed=5, without=[rows[0]["prompt"].upper()])
    assert left == rows[1:51]


def test_generated_rows_say_what_their_reward_reads() -> None:
    rows = make_rows("geneval", 1200, seed=1)
    assert {row["tag"]: 0 for row in rows}.keys() == {
        "single_object", "two_object", "counting", "colors", "position", "color_attr",
    }  # fmt: skip
    for row in rows:
        check_row(row["include"], row.get("exclude"))
        for clause in row["include"]:
            many = clause["count"] > 1
            noun = plural(clause["class"]) if many else one(clause["class"], clause.get("color"))
            assert noun in row["prompt"]
        if row["tag"] == "position":
            fixed, moved = row["include"]
            words = f"{one(moved['class'])} {moved['position'][0]} {one(fixed['class'])}"
            assert words in row["prompt"]
    for row in make_rows("ocr", 1000, seed=1):
        assert wanted_text("ocr", "row 0", row["prompt"]) == row["text"]
    assert not any(held_out(row) for row in make_rows("pocket", 300, seed=1))


def test_nouns_are_english() -> None:
    assert [plural(n) for n in ("bus", "bench", "toothbrush", "knife", "cow", "hot dog")] == [
        "buses", "benches", "toothbrushes", "knives", "cows", "hot dogs",
    ]  # fmt: skip
    assert [one("orange", "red"), one("orange"), one("car", "orange"), one("skis", "blue")] == [
        "a red orange", "an orange", "an orange car", "a blue pair of skis",
    ]  # fmt: skip
    assert one("skis", "orange") == "an orange pair of skis" and one("scissors") == (
        "a pair of scissors"
    )
    assert len({plural(name) for name in CLASSES}) == len(CLASSES)


def test_the_command_writes_a_file_once(tmp_path: Path) -> None:
    out, text = tmp_path / "new" / "g.jsonl", tmp_path / "o.txt"
    arguments = ["prompts", "geneval", "--n", "20", "--seed", "3"]
    assert "20 prompts" in run(*arguments, "--out", str(out)).output
    assert [{**p.metadata, "prompt": p.text} for p in load_prompts(out)] == make_rows(
        "geneval", 20, 3
    )
    again = tmp_path / "again.jsonl"
    run(*arguments, "--without", str(out), "--out", str(again))
    assert not {p.text for p in load_prompts(out)} & {p.text for p in load_prompts(again)}
    run("prompts", "ocr", "--n", "9", "--out", str(text))
    assert len(load_prompts(text)) == 9
    before = out.read_bytes()
    for words, more in (
        ("already", [*arguments, "--out", str(out)]),
        ("use .jsonl", [*arguments, "--out", str(tmp_path / "g.txt")]),
        ("should end with", [*arguments, "--out", str(tmp_path / "g.csv")]),
        ("did you mean 'ocr'", ["prompts", "orc", "--out", str(tmp_path / "x.txt")]),
        (
            "different prompts",
            ["prompts", "pocket", "--n", "5000", "--out", str(tmp_path / "x.txt")],
        ),
    ):
        assert words in run(*more, code=2).output
    assert out.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["again.jsonl", "new", "o.txt"]
    with pytest.raises(UserError, match=r"--out"):
        write_rows(Path("/proc/x.txt"), [{"prompt": "a"}])
