"""Nothing that was ranked is lost; the folder is a dataset that offline training reads."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from dgpo.errors import UserError
from dgpo.preferences import read_groups
from dgpo.ranking.answers import Likes, Order, Skip, Stars
from dgpo.ranking.dataset import export
from dgpo.ranking.desk import Desk
from dgpo.ranking.store import Store


def pictures(count=3, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (count, 4, 6, 3), np.uint8)
    return [Image.fromarray(one) for one in noise]


def test_the_dataset_is_what_offline_training_reads(tmp_path):
    store = Store(tmp_path / "ranking")
    prompt = 'a "sign"\u2028<b>&'
    first = store.add(prompt, pictures(), {"tag": "colors", "seed": 3, "mask": None})
    second = store.add("a dog", pictures(seed=1))
    store.add("nobody looked", pictures(seed=2))
    store.answer(first, "ann", Order(best_first=[2, 0, 1]))
    store.answer(first, "Bob Ödön", Likes(liked=[2]))
    store.answer(first, "cid", Skip())
    store.answer(second, "cid", Skip())
    assert export(store) == 1
    (group,) = read_groups(tmp_path / "ranking")
    assert group.text == prompt and group.metadata == {"tag": "colors", "seed": 3}
    assert group.rewards == (0.25, 0.0, 1.0)
    assert group.raters == {"ann": (0.5, 0.0, 1.0), "Bob Ödön": (0.0, 0.0, 1.0)}
    for file, own in zip(group.images, pictures(), strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(own))


def test_what_a_prompt_speaks_of_is_kept_beside_the_group(tmp_path):
    store = Store(tmp_path / "ranking")
    (house,) = pictures(1, seed=5)
    house.save(tmp_path / "house.png")
    mask = Image.new("L", (6, 4), 255)
    row = {"image": str(tmp_path / "house.png"), "mask": mask, "tag": "edit"}
    group = store.add("a red roof", pictures(), row)
    assert set(group.sources) == {"image", "mask"}
    (tmp_path / "house.png").unlink()
    (tmp_path / "ranking").rename(tmp_path / "moved")
    store = Store(tmp_path / "moved")
    store.answer(group, "ann", Likes(liked=[1]))
    assert export(store) == 1
    (read,) = read_groups(tmp_path / "moved")
    assert read.metadata["tag"] == "edit"
    kept = read.text.pictures
    assert kept["image"].tobytes() == house.tobytes() and kept["image"].mode == "RGB"
    assert kept["mask"].tobytes() == mask.tobytes() and kept["mask"].mode == "L"


def test_another_source_is_another_group(tmp_path):
    store = Store(tmp_path)
    one, other = ({"image": picture} for picture in pictures(2, seed=5))
    assert store.add("x", pictures(), one) == store.add("x", pictures(), one)
    assert len({store.add("x", pictures(), row).id for row in (one, other, None)}) == 3
    # a row that only claims a file of the group has none
    assert store.add("y", pictures(), {"tag": "images/a-image.png"}).sources == {}


def test_a_later_answer_counts_and_the_earlier_one_is_kept(tmp_path):
    store = Store(tmp_path)
    group = store.add("a cat", pictures())
    store.answer(group, "ann", Likes(liked=[0]), 2.5)
    store.answer(group, "ann", Stars(stars=[1, 1, 5]))
    assert store.rewards(group) == {"ann": [0, 0, 1]}
    assert store.counts() == {"ann": 1} and store.last_of("ann") == group
    rows = sqlite3.connect(tmp_path / "ranking.sqlite").execute("SELECT seconds FROM answers")
    assert rows.fetchall() == [(2.5,), (None,)]


def test_the_same_prompt_and_pixels_are_the_same_group(tmp_path):
    store = Store(tmp_path)
    group = store.add("a cat", pictures())
    assert store.add("a cat", pictures()) == group and len(store.groups()) == 1
    others = [("a dog", pictures()), ("a cat", pictures()[::-1]), ("a cat", pictures(seed=9))]
    assert len({store.add(*other).id for other in others} | {group.id}) == 4
    assert len(list((tmp_path / "images").iterdir())) == 12


KILLED = """
import os, signal, sys
from PIL import Image
from dgpo.ranking.answers import Likes
from dgpo.ranking.store import Store
store = Store(sys.argv[1])
for number in range(1000):
    images = [Image.new("RGB", (2, 2), (number % 256, i, 0)) for i in (0, 1)]
    group = store.add(f"prompt {number}", images)
    store.answer(group, "ann", Likes(liked=[number % 2]))
    print(number, flush=True)
"""


def test_what_was_acknowledged_is_there_after_a_kill(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    said = [int(child.stdout.readline()) for _ in range(5)]
    os.kill(child.pid, signal.SIGKILL)
    said += [int(line) for line in child.communicate()[0].splitlines()]
    store = Store(tmp_path)
    assert store.counts()["ann"] >= len(said)
    assert export(store) == store.counts()["ann"]
    for number, group in zip(said, read_groups(tmp_path), strict=False):
        assert group.text == f"prompt {number}"
        assert group.rewards == (float(number % 2 == 0), float(number % 2 == 1))


def test_what_cannot_be_ranked_is_refused(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(UserError, match="2 or more"):
        store.add("alone", pictures(1))
    with pytest.raises(UserError, match="cannot be ranked"):
        store.add("a film", [pictures(), pictures()])  # pyright: ignore
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="choose another folder"):
        Store(tmp_path / "file")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "ranking.sqlite").write_text("no database at all, " * 100)
    with pytest.raises(UserError, match="not a database"):
        Store(tmp_path / "odd")


def test_raters_get_different_groups_until_none_is_left(tmp_path):
    desk = Desk(Store(tmp_path))
    one, two = (desk.post("a cat", pictures(seed=seed)) for seed in (1, 2))
    assert desk.next("ann") == [one]
    assert desk.next("bob") == [two] and desk.next("ann") == [one]
    assert desk.answer(one.id, "ann", Likes(liked=[0]))
    assert desk.next("ann") == [two], "what another looks at comes last, but it comes"
    assert desk.answer(two.id, "bob", Skip())
    assert desk.next("ann") == [] and desk.state().waiting == 0


def test_a_group_waits_for_as_many_people_as_are_wanted(tmp_path):
    desk = Desk(Store(tmp_path), raters=2)
    group = desk.post("a cat", pictures())
    desk.answer(group.id, "ann", Likes(liked=[0, 1]))
    assert desk.next("ann") == [] and desk.next("bob") == [group]
    found: list[list[float]] = []
    waiting = threading.Thread(target=lambda: found.append(desk.rewards(group)))
    waiting.start()
    assert desk.answer(group.id, "ann", Likes(liked=[0])) and not found
    assert desk.answer(group.id, "bob", Likes(liked=[0, 2]))
    waiting.join(10)
    assert found == [[1.0, 0.0, 0.5]]
    state = desk.state()
    # ann prefers 0 to 1 and to 2, bob 0 and 2 to 1
    assert (state.agreement.same, state.agreement.pairs) == (1, 1)
    assert not desk.answer(group.id, "bob", Skip()), "too late for whoever waited"
    assert desk.rewards(group) == [1.0, 0.0, 0.0]


def test_nobody_has_an_opinion(tmp_path):
    desk = Desk(Store(tmp_path))
    group = desk.post("a cat", pictures())
    desk.answer(group.id, "ann", Skip())
    assert desk.rewards(group) is None


def test_a_new_session_shows_what_was_left(tmp_path):
    store = Store(tmp_path)
    done, left = (store.add("a cat", pictures(seed=seed)) for seed in (1, 2))
    store.answer(done, "ann", Likes(liked=[1]))
    store.close()
    desk = Desk(Store(tmp_path))
    assert desk.next("bob") == []
    desk.reopen()
    assert desk.next("bob", 5) == [left]
    assert desk.rewards(desk.post("a cat", pictures(seed=1))) == [0, 1, 0], "known again, not asked"
