"""The page in a real browser: Debian's Chromium without a window, by mouse and by keyboard."""

import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dgpo.ranking.answers import Likes, Order, Skip, Stars
from dgpo.ranking.desk import Desk
from dgpo.ranking.server import PageServer
from dgpo.ranking.store import Store

pytest.importorskip("fastapi")
api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no chromium (apt install chromium)", allow_module_level=True)
pytestmark = pytest.mark.slow

PROMPT = '<img src=x onerror="document.title=\'run\'"> & <b>a "cat"</b> 中'
COLOURS = [(220, 30, 30), (30, 30, 220), (40, 170, 60), (20, 20, 20)]
RED, BLUE, GREEN, BLACK = range(4)
READ = """tile => {
  const img = tile.querySelector("img");
  const canvas = document.createElement("canvas");
  canvas.width = img.naturalWidth; canvas.height = img.naturalHeight;
  const context = canvas.getContext("2d");
  context.drawImage(img, 0, 0);
  return [...context.getImageData(1, 1, 1, 1).data].slice(0, 3);
}"""


def pictures(seed=0):
    """One picture a colour; the seed is in a corner, so that groups differ."""
    made = []
    for colour in COLOURS:
        pixels = np.full((16, 16, 3), colour, np.uint8)
        pixels[-1, -1] = seed
        made.append(Image.fromarray(pixels))
    return made


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield made
        made.close()


@pytest.fixture
def desk(tmp_path):
    return Desk(Store(tmp_path / "ranking"))


@pytest.fixture
def page(browser):
    errors: list[str] = []
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    made = context.new_page()
    made.set_default_timeout(60_000)
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    made.errors = errors
    yield made
    context.close()


def enter(page, server, name="Ann"):
    page.goto(server.url)
    page.fill("#name", name)
    page.click("text=Start")


def tiles(page, prompt):
    """The tiles of a group by their colour, as soon as it is shown: colour -> place on the page."""
    page.wait_for_function(
        """prompt => !document.querySelector("#work").hidden
        && document.querySelector("#prompt").textContent === prompt
        && [...document.querySelectorAll(".tile img")].every(img => img.naturalWidth)""",
        arg=prompt,
    )
    found = [tile.evaluate(READ) for tile in page.query_selector_all(".tile")]
    near = [int(np.argmin([np.abs(np.subtract(c, f)).sum() for c in COLOURS])) for f in found]
    assert sorted(near) == [0, 1, 2, 3]
    return {colour: place for place, colour in enumerate(near)}


def wait_for(what):
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


def said(page, desk, group, name="Ann"):
    """The rater's answer, as soon as it is there; the page is served meanwhile by its thread."""
    wait_for(lambda: name in desk.store.answers(group))
    return desk.store.answers(group)[name]


def test_a_session_by_mouse_and_keyboard(page, desk):
    server = PageServer(port=0)
    server.start(desk, "likes")
    first = desk.post(PROMPT, pictures(1))
    enter(page, server)

    where = tiles(page, PROMPT)
    assert page.title() == "dgpo rank", "the prompt's code did not run"
    assert page.text_content("#done").startswith("None of them")
    picks = page.query_selector_all(".pick")
    picks[where[RED]].click()
    picks[where[GREEN]].click()
    picks[where[GREEN]].click()  # not after all
    page.keyboard.press("1234"[where[BLACK]])
    assert page.text_content("#done").startswith("Done: 2 liked")
    page.keyboard.press("Enter")
    assert said(page, desk, first) == Likes(liked=[RED, BLACK])

    page.wait_for_selector("#wait:not([hidden])")
    assert "drawing" in page.text_content("#note")
    second = desk.post("a dog", pictures(2))  # it comes without a reload
    where = tiles(page, "a dog")
    page.click("text=Order")
    assert page.is_disabled("#done")
    for colour in (BLUE, RED, BLACK):
        page.keyboard.press("1234"[where[colour]])
    page.keyboard.press("1234"[where[RED]])  # taken back: black is second now
    marks = [mark.text_content() for mark in page.query_selector_all(".mark")]
    assert [marks[where[colour]] for colour in (RED, BLUE, GREEN, BLACK)] == ["", "1", "", "2"]
    page.click("#done")
    assert said(page, desk, second) == Order(best_first=[BLUE, BLACK])

    third = desk.post("a bird", pictures(3))
    where = tiles(page, "a bird")
    page.click("text=Stars")
    colour_at = {place: colour for colour, place in where.items()}
    page.click("#prompt")
    page.keyboard.press("ArrowLeft")  # at the first already
    for place in range(3):
        page.keyboard.press(str(1 + colour_at[place]))
    assert page.is_disabled("#done") and "3 of 4" in page.text_content("#done")
    page.keyboard.press("Enter")
    page.query_selector_all(".tile")[3].query_selector_all(".stars button")[4].click()
    page.keyboard.press("Enter")
    stars = [1, 2, 3, 4]
    stars[colour_at[3]] = 5
    assert said(page, desk, third) == Stars(stars=stars)

    page.wait_for_selector("#wait:not([hidden])")
    fourth = desk.post("a fish", pictures(4))
    tiles(page, "a fish")
    page.keyboard.press("Backspace")  # to the third, as it was answered
    tiles(page, "a bird")
    assert len(page.query_selector_all(".stars button.lit")) == sum(stars)
    page.keyboard.press("Enter")
    tiles(page, "a fish")
    page.keyboard.press("z")
    assert page.is_visible("#large")
    page.keyboard.press("z")
    assert not page.is_visible("#large")
    page.keyboard.press("s")
    assert said(page, desk, fourth) == Skip()
    assert desk.store.counts() == {"Ann": 4}
    assert page.errors == []
    server.stop()


def test_keys_are_not_heard_before_the_next_group_is_there(page, desk):
    server = PageServer(port=0)
    server.start(desk, "likes")
    first, second = desk.post("a cat", pictures(1)), desk.post("a dog", pictures(2))
    enter(page, server)
    where = tiles(page, "a cat")
    held = []
    page.route(re.compile(r"/v1/(groups|last)\?"), lambda route: held.append(route))
    page.keyboard.press("1234"[where[RED]])
    page.keyboard.press("Enter")
    wait_for(lambda: page.wait_for_timeout(20) or held)
    for key in ("s", "Enter", "Backspace"):
        page.keyboard.press(key)
    page.wait_for_timeout(300)
    assert len(held) == 1 and page.is_disabled("#skip") and page.is_disabled("#back")
    held[0].continue_()
    page.unroute_all()
    where = tiles(page, "a dog")
    page.wait_for_selector("#skip:enabled")
    assert desk.store.answers(first)["Ann"] == Likes(liked=[RED]), "not skipped afterwards"
    page.keyboard.press("1234"[where[BLUE]])
    page.keyboard.press("Enter")
    assert said(page, desk, second) == Likes(liked=[BLUE])
    assert page.errors == []
    server.stop()


def test_an_answer_waits_for_a_server_that_is_away(page, desk):
    server = PageServer(port=0)
    server.start(desk, "likes")
    group = desk.post("a cat", pictures())
    enter(page, server)
    where = tiles(page, "a cat")
    server.stop()
    page.keyboard.press("1234"[where[BLUE]])
    page.keyboard.press("Enter")
    page.wait_for_selector("#problem:not([hidden])")
    assert "No connection" in page.text_content("#problem") and not desk.store.answers(group)
    again = PageServer(port=server.port)
    again.start(desk, "likes")
    assert said(page, desk, group) == Likes(liked=[BLUE])
    page.wait_for_selector("#problem", state="hidden")
    again.stop()


def test_the_token_is_asked_for_and_two_people_see_their_agreement(page, desk, tmp_path):
    (tmp_path / "token").write_text("correct-horse")
    server = PageServer(port=0, token_file=tmp_path / "token")
    desk.raters = 2
    server.start(desk, "likes")
    group = desk.post("a cat", pictures())
    desk.post("a dog", pictures())
    desk.answer(group.id, "Bob", Order(best_first=[RED, BLUE, GREEN, BLACK]))
    enter(page, server)
    page.wait_for_selector("#token-line:not([hidden])")
    page.fill("#token", "wrong")
    page.click("text=Start")
    page.wait_for_selector("text=not the right one")
    page.fill("#token", "correct-horse")
    page.click("text=Start")
    where = tiles(page, "a cat")
    page.click("text=Order")
    for colour in (RED, BLUE, BLACK, GREEN):
        page.keyboard.press("1234"[where[colour]])
    page.keyboard.press("Enter")
    page.wait_for_selector("text=2 raters · they agree on 83% of 6 pairs")
    server.stop()


def test_all_pictures_are_seen_on_a_large_and_on_a_small_screen(page, desk, tmp_path):
    server = PageServer(port=0)
    server.start(desk, "likes")
    desk.post("many", [Image.new("RGB", (32, 32), (i * 10, 80, 90)) for i in range(16)])
    enter(page, server)
    page.wait_for_selector("#work:not([hidden]) .tile")
    for width, height in ((1200, 800), (1600, 700)):
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(200)
        boxes = [tile.bounding_box() for tile in page.query_selector_all(".tile")]
        assert all(b["x"] >= 0 and b["x"] + b["width"] <= width for b in boxes)
        assert all(b["y"] >= 0 and b["y"] + b["height"] <= height for b in boxes)
        assert min(b["width"] for b in boxes) > 110
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    Path(tmp_path / "small.png").write_bytes(page.screenshot())
    server.stop()


def test_the_picture_to_be_changed_is_beside_the_group(page, desk):
    server = PageServer(port=0)
    server.start(desk, "likes")
    source, mask = Image.new("RGB", (16, 16), (240, 200, 0)), Image.new("L", (16, 16), 255)
    edited = desk.post("make it red", pictures(1), {"image": source, "mask": mask})
    plain = desk.post("a dog", pictures(2))
    enter(page, server)
    tiles(page, "make it red")
    shown = page.query_selector_all("#sources figure")
    assert [one.evaluate(READ)[:3] for one in shown] == [[240, 200, 0], [255, 255, 255]]
    assert [one.query_selector("figcaption").text_content() for one in shown] == [
        "What is to be changed",
        "Where (white)",
    ]
    boxes = [page.query_selector(name).bounding_box() for name in ("#sources", "#grid")]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"], "beside, not over it"
    shown[0].query_selector("button").click()
    assert page.is_visible("#large[open]")
    page.keyboard.press("z")
    assert not page.is_visible("#large[open]")
    page.keyboard.press("1")
    page.keyboard.press("Enter")  # the outline is on a picture of the group again
    assert isinstance(said(page, desk, edited), Likes)
    tiles(page, "a dog")
    assert not page.is_visible("#sources")
    assert plain.sources == {} and not page.errors
    server.stop()
