"""Prompts: reading them, refusing broken ones, and choosing those of an iteration."""

import json
import pickle
from collections import Counter

import pytest
from PIL import Image

from dgpo.errors import UserError
from dgpo.pocket import prompts as pocket
from dgpo.pocket.scenes import CATEGORIES, all_metadata, parse_caption
from dgpo.prompts import Prompt, PromptSampler, load_prompts, refuse_sizes
from dgpo.prompts.caption import pictures_of


def test_text_files_with_bom_windows_line_ends_and_blank_lines(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbfa cat\r\n\r\n  a dog \r\na \xe2\x80\xa8 line separator")
    assert [p.text for p in load_prompts(file)] == ["a cat", "a dog", "a \u2028 line separator"]
    assert load_prompts(str(file)) == load_prompts(file)


def test_lines_that_end_as_on_an_old_mac_are_lines(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(b"a cat\ra dog\r\ra bird\r")
    assert [(p.text, p.where) for p in load_prompts(file)] == [
        ("a cat", f"{file}, line 1"),
        ("a dog", f"{file}, line 2"),
        ("a bird", f"{file}, line 4"),
    ]
    rows = tmp_path / "p.jsonl"
    rows.write_bytes(b'{"prompt": "a cat"}\r{"prompt": "a dog"}')
    assert [p.text for p in load_prompts(rows)] == ["a cat", "a dog"]


def test_splits_of_a_dataset_are_no_prompts():
    import datasets

    table = datasets.Dataset.from_list([{"prompt": "a"}])
    both = datasets.DatasetDict(train=table, test=table)
    with pytest.raises(UserError, match=r"DatasetDict holds the splits 'train', 'test'; give one"):
        load_prompts(both)
    assert load_prompts(both["train"]) == [Prompt("a")]


@pytest.mark.parametrize("coding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_files_with_a_mark_of_other_encodings(tmp_path, coding):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffa cat\r\nzwei B\u00e4ren".encode(coding))
    assert load_prompts(file) == [Prompt("a cat"), Prompt("zwei B\u00e4ren")]


def test_jsonl_keeps_what_else_a_row_has(tmp_path):
    file = tmp_path / "p.jsonl"
    rows = [
        {"prompt": "a cat", "tag": "x", "include": [{"class": "cat", "count": 1}]},
        {"prompt": "b"},
    ]
    file.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    assert load_prompts(file) == [
        Prompt("a cat", {"tag": "x", "include": [{"class": "cat", "count": 1}]}),
        Prompt("b"),
    ]


def test_rows_and_datasets():
    import datasets

    rows = ["a", {"prompt": "b", "text": "7"}, Prompt("c", {"k": 1})]
    assert load_prompts(rows) == [Prompt("a"), Prompt("b", {"text": "7"}), Prompt("c", {"k": 1})]
    table = datasets.Dataset.from_list([{"prompt": "a", "text": "1"}, {"prompt": "b", "text": "2"}])
    assert load_prompts(table) == [Prompt("a", {"text": "1"}), Prompt("b", {"text": "2"})]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("e.txt", b"", ["e.txt", "empty"]),
        ("blank.txt", b"\n \r\n", ["empty"]),
        ("zero.txt", b"a cat\na d\0og\n", ["line 2", "zero bytes", "UTF-8"]),
        ("le.txt", "a cat\n".encode("utf-16-le"), ["line 1", "UTF-16 without a mark"]),
        ("be.txt", "a cat\n".encode("utf-16-be"), ["line 1", "UTF-16 without a mark"]),
        ("le32.txt", "a cat\n".encode("utf-32-le"), ["line 1", "zero bytes"]),
        ("half.txt", b"\xff\xfe\0\0a\0", ["mark says UTF-32"]),
        ("latin.txt", b"fine\ncaf\xe9\n", ["line 2", "UTF-8"]),
        ("j.jsonl", b'{"prompt": "a"}\n{"prompt": \n', ["line 2", "not JSON"]),
        ("l.jsonl", b'["a"]', ["line 1", "object"]),
        ("k.jsonl", b'\n{"caption": "a"}', ["line 2", "no 'prompt'", "caption"]),
        ("n.jsonl", b'{"prompt": 3}', ["line 1", "got 3"]),
        ("w.jsonl", b'{"prompt": "  "}', ["line 1", "not empty"]),
        ("t.csv", b"a,b", [".csv", ".jsonl"]),
    ],
)
def test_broken_files_are_refused_with_the_line(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_prompts(file)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("no/such/file.txt", "does not exist"),
        ("pocket-geneval/tran", "pocket-geneval/train"),
        ([], "at least one"),
        (["a", 3], "row 1"),
        ([{"text": "a"}], "no 'prompt'"),
        (None, "prompts.train"),
    ],
)
def test_other_bad_sources(source, word):
    with pytest.raises(UserError, match=word):
        load_prompts(source)


def test_a_folder_is_no_prompts_file(tmp_path):
    with pytest.raises(UserError, match="folder"):
        load_prompts(tmp_path)


def test_sampler_gives_each_prompt_once_an_epoch():
    prompts = load_prompts([str(i) for i in range(12)])
    sampler = PromptSampler(prompts, per_iteration=4, seed=3)
    for epoch in range(3):
        seen = [p.text for i in range(3) for p in sampler.at(3 * epoch + i)]
        assert sorted(seen) == sorted(p.text for p in prompts)


def test_sampler_needs_no_state_to_resume():
    prompts = load_prompts([str(i) for i in range(10)])
    whole = [PromptSampler(prompts, 7, 5).at(i) for i in range(20)]
    one = PromptSampler(prompts, 7, 5)
    assert [one.at(i) for i in reversed(range(20))] == whole[::-1]
    assert whole != [PromptSampler(prompts, 7, 6).at(i) for i in range(20)]


def test_sampler_takes_more_than_there_are():
    sampler = PromptSampler(load_prompts(["a", "b", "c"]), per_iteration=9, seed=0)
    assert Counter(p.text for p in sampler.at(4)) == {"a": 3, "b": 3, "c": 3}


def _combinations(rows, tag):
    """What identifies a held-out combination, order left out."""
    keys = ("class",) if tag == "position" else ("color", "class")
    return {
        frozenset(tuple(clause[k] for k in keys) for clause in row.metadata["include"])
        for row in rows
        if row.metadata["tag"] == tag
    }


def test_pocket_train_and_test_share_no_held_out_combination():
    train, test = load_prompts("pocket-geneval/train"), load_prompts("pocket-geneval/test")
    for tag, least in (("position", 2 / 6), ("color_attr", 0.2)):
        seen, held = _combinations(train, tag), _combinations(test, tag)
        assert seen and held and not seen & held
        every = len(seen) + len(held)
        assert len(held) / every >= max(least - 1e-9, 0.15)
    assert _combinations(test, "position") == {
        frozenset({("circle",), ("cross",)}),
        frozenset({("square",), ("triangle",)}),
    }
    texts = {p.text for p in train}
    assert not texts & {p.text for p in test if p.metadata["tag"] in ("position", "color_attr")}


def test_pocket_sets_have_their_shares_of_categories_and_every_caption():
    train, test = load_prompts("pocket-geneval/train"), load_prompts("pocket-geneval/test")
    for first in range(0, len(train), 12):
        assert Counter(p.metadata["tag"] for p in train[first : first + 12]) == pocket.TRAIN_WEIGHTS
    assert Counter(p.metadata["tag"] for p in test) == dict.fromkeys(CATEGORIES, 110)
    every = {row["prompt"] for rows in all_metadata().values() for row in rows}
    assert {p.text for p in train} | {p.text for p in test} == every
    for tag in ("single_object", "two_object", "counting", "colors"):
        wanted = {row["prompt"] for row in all_metadata()[tag]}
        assert {p.text for p in test if p.metadata["tag"] == tag} == wanted
    for p in [*train, *test]:
        read = parse_caption(p.text)
        assert (read["tag"], read["include"]) == (p.metadata["tag"], p.metadata["include"])


GOLDEN = [
    "a photo of a cross",
    "a photo of a red square and a blue triangle",
    "a photo of a triangle above a square",
    "a photo of a black cross and a blue triangle",
]


def test_pocket_test_rows_are_fixed_with_distinct_noise():
    test = load_prompts("pocket-geneval/test")
    seeds = [p.metadata["seed"] for p in test]
    assert len(set(seeds)) == 660 and all(type(s) is int for s in seeds)
    # golden: published scores refer to these rows
    assert [test[i].text for i in (0, 5, 658, 659)] == GOLDEN
    assert pocket.test_prompts() == pocket.test_prompts()


def picture(file, size=(8, 6)):
    Image.new("RGB", size, (200, 10, 10)).save(file)
    return file


def test_pictures_are_found_beside_the_prompt_file(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    picture(tmp_path / "in" / "a.png")
    file = tmp_path / "edit.jsonl"
    file.write_text('{"prompt": "make it blue", "image": "in/a.png", "mask": "in/a.png", "n": 1}\n')
    monkeypatch.chdir(tmp_path / "in")
    (row,) = load_prompts(file)
    assert row.text == "make it blue"
    pictures = pictures_of(row.text)
    assert pictures["image"].size == (8, 6) and pictures["image"].mode == "RGB"
    assert pictures["mask"].mode == "L"
    assert row.metadata["image"] == str(tmp_path / "in" / "a.png")
    assert row.column("image") is pictures["image"] and row.column("n") == 1
    again = pickle.loads(pickle.dumps(row))
    assert pictures_of(again.text)["image"].size == (8, 6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.png", ["line 2", "'image' is 'none.png'", "no file"]),
        ("edit.jsonl", ["no picture"]),
        ("https://x.org/a.png", ["line 2", "the address 'https://x.org/a.png'", "file"]),
    ],
)
def test_a_picture_that_is_not_there_is_refused_with_its_line(tmp_path, name, words):
    picture(tmp_path / "a.png")
    file = tmp_path / "edit.jsonl"
    file.write_text(f'{{"prompt": "a", "image": "a.png"}}\n{{"prompt": "b", "image": "{name}"}}\n')
    with pytest.raises(UserError) as caught:
        load_prompts(file)
    for word in words:
        assert word in str(caught.value)


def test_a_picture_of_a_dataset_and_what_is_none(tmp_path):
    (row,) = load_prompts([{"prompt": "a", "image": Image.new("L", (4, 4))}])
    assert pictures_of(row.text)["image"].mode == "RGB"
    (plain,) = load_prompts([{"prompt": "a", "image": None}])
    assert pictures_of(plain.text) == {} and plain.column("image") is None
    with pytest.raises(UserError, match=r"row 0.*must be a file"):
        load_prompts([{"prompt": "a", "image": 3}])


@pytest.mark.parametrize("key", ["height", "width"])
def test_a_row_with_a_size_of_its_own_is_refused(key):
    rows = load_prompts(["red dog", {"prompt": "a cat", key: 512}])
    refuse_sizes(rows, {key: 512})
    for call in ({}, {key: 768}):
        with pytest.raises(UserError, match=rf"'a cat' has {key} = 512.*rollout\.call\.{key}"):
            refuse_sizes(rows, call)
