"""The OCR rewards: the formula by hand, which text is wanted, and a real engine on real renders."""

import sys
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from dgpo.errors import MissingExtra, UserError
from dgpo.pocket.signs import test_prompts
from dgpo.prompts import Prompt
from dgpo.registry import resolve
from dgpo.rewards import load_rewards
from dgpo.rewards.quotes import quoted
from dgpo.rewards.shipped.ocr import (
    exact_score,
    ocr,
    ocr_score,
    pocket_ocr,
    pocket_ocr_exact,
)
from tools.pretrain.sign_drawing import draw_sign, render

test_prompts.__test__ = False  # the name is the package's, pytest would collect it


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("407", "407", 1.0),
        ("", "407", 0.0),
        ("40", "407", 1 - 1 / 3),  # one missing
        ("467", "407", 1 - 1 / 3),  # one wrong
        ("740", "407", 1 - 2 / 3),  # 7 moved to the front: one insertion, one deletion
        ("4O7l", "407", 1 - 2 / 3),  # one wrong, one too many
        ("abcdefgh", "407", 0.0),  # a distance of 8 counts as 3
        ("14075", "407", 1.0),  # the wanted text is a part of what was read
        ("4071", "407", 1.0),
        ("Hello World", "helloworld", 1.0),  # spaces and case do not count
        ("HELO", "h e l l o", 1 - 1 / 5),
        ("OPEN\n24 h", "open 24h", 1.0),
        ("It's - “now”", 'it’s – "now"', 1.0),  # as on a keyboard
        ("ＯＰＥＮ", "open", 1.0),  # NFKC
        ("cafe\u0301", "caf\u00e9", 1.0),
        ("m2", "m²", 1.0),
    ],
)
def test_formula(read: str, wanted: str, score: float) -> None:
    assert ocr_score(read, wanted) == pytest.approx(score, abs=1e-12)


def test_exact_takes_no_more_and_no_less() -> None:
    assert exact_score("4 07", "407") == 1.0
    assert exact_score("4071", "407") == 0.0
    assert exact_score("40", "407") == 0.0


def test_formula_refuses_an_empty_wish() -> None:
    # every text contains the empty one: the score would always be 1
    with pytest.raises(ValueError, match="empty"):
        ocr_score("anything", "  ")


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign that says "407"', ["407"]),
        ("a sign that says “Open Late”", ["Open Late"]),
        ("ein Schild „Halt“ am Weg", ["Halt"]),
        ("en skylt ”Stopp” vid vägen", ["Stopp"]),
        ('一个写着"开放"的牌子', ["开放"]),
        ("a sign that says 'STOP'", ["STOP"]),
        ("a sign that says ‘STOP’", ["STOP"]),
        ('first "one", then "two"', ["one", "two"]),
        ("'single' stands first, but \"double\" wins", ["double"]),
        ("a dog's bowl that says 'REX'", ["REX"]),
        ("a bowl at the dogs' door that says 'REX'", ["REX"]),
        ("it says 'don't stop' in red", ["don't stop"]),
        ('a sign: "don\'t stop" (in red)', ["don't stop"]),
        ("a board that says \"He said 'hi' to me\"", ["He said 'hi' to me"]),
        ('an empty "" and a full "7"', ["7"]),
        ('a banner says"Open"today', ["Open"]),
        ('a 12" vinyl record with the label "Blue"', ["Blue"]),
        ('a sign that says "Blue" on a 7" single', ["Blue"]),
        ("a 12” record, “Blue”", ["Blue"]),
        ('a 5"x7" print of "Rome"', ["Rome"]),
        ("a 6'2\" man with the sign 'Hello'", ["Hello"]),
        ("a '90s diner with a sign that says 'Open'", ["Open"]),
        ("a ‘90s diner with a sign that says ‘Open’", ["Open"]),
        ("a door with the number '24'", ["24"]),
        ("a dog's bowl at the dogs' door", []),
        ("a '90s diner", []),
        ('a 12" record', []),
        ('nothing but " "', []),
        ("a plain sign", []),
    ],
)
def test_quoted(prompt: str, texts: list[str]) -> None:
    assert quoted(prompt) == texts


@pytest.mark.parametrize(
    "prompt",
    [
        'a sign that says "Open',
        'a sign that says Open"',
        "a sign that says 'Open",
        'a label that says "12" vinyl"',
        'a board that says "He said "hi" to me"',
        "a board that says “He said “hi” to me”",
        "a board that says 'The \"Best\" Cafe'",
        "a sign that says 'the dogs' door'",
        "a rock 'n' roll club with the sign 'Open'",
        "a class of '99 banner that says 'Go'",
    ],
)
def test_quotes_in_doubt_are_refused_with_what_would_work(prompt: str) -> None:
    with pytest.raises(UserError, match=r"f.txt, line 3: .*(pair of|inside) quotes; give the row"):
        ocr.check([Prompt('a "1"'), Prompt(prompt, where="f.txt, line 3")])
    ocr.check([Prompt(prompt, {"text": "Open"})])


def test_check_names_the_row_without_text() -> None:
    good = [Prompt('a "1"'), Prompt("a sign", {"text": "2"})]
    ocr.check(good)
    with pytest.raises(UserError, match=r"'ocr', prompt row 2: 'a plain sign' quotes no text"):
        ocr.check([*good, Prompt("a plain sign")])


def test_rows_beyond_the_alphabet_are_named_and_remain() -> None:
    rows = [Prompt('a "1"'), Prompt('"Floor 13½"', where="f.txt, line 2"), Prompt('"ОТКРЫТО"')]
    said = (
        "reward 'ocr': 2 of 3 rows want characters that the reader does not have, and cannot reach "
        "1: f.txt, line 2 (½), prompt row 2 (КОРТЫ)"
    )
    with pytest.warns(UserWarning) as caught:
        ocr.check(rows)
    assert [str(one.message) for one in caught] == [said]
    with pytest.warns(UserWarning, match=r"12 of 13 rows .* prompt row 9 \(½\), and 2 more$"):
        ocr.check([Prompt('"1½"')] * 12 + rows[:1])


def test_rows_of_which_nothing_can_be_read_are_refused() -> None:
    for reward in (ocr, pocket_ocr):
        with pytest.raises(UserError, match="no character of any text, such as 'ОТКРЫТО'"):
            reward.check([Prompt('"ОТКРЫТО"'), Prompt('"ЦЫ"')])


def test_what_can_be_read_is_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    ocr.check([Prompt("“It’s – CAFÉ…” ²"), Prompt("猫", {"text": "日猫"})])
    assert not recwarn.list


def test_rows_that_quote_several_texts_are_named() -> None:
    with pytest.warns(UserWarning, match=r"1 of 2 rows quote several texts.*row 1 \(takes 'one'\)"):
        ocr.check([Prompt('a "1"'), Prompt('first "one", then "two"')])


@pytest.mark.parametrize("text", [407, "", "  ", ["407"]])
def test_check_refuses_a_text_that_is_none(text: object) -> None:
    with pytest.raises(UserError, match=r"row 0: text = .* must be a text"):
        pocket_ocr.check([Prompt('a sign that says "407"', {"text": text})])


def test_missing_engine_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"pip install 'dgpo\[rewards\]'"):
        ocr.check([Prompt('a "1"')])


def pictures(texts: list[str], seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(x) for x in render([draw_sign(text, rng) for text in texts])]


def test_clean_signs_are_read() -> None:
    rows = test_prompts()[:60]
    images = pictures([row["text"] for row in rows], seed=0)
    prompts = [row["prompt"] for row in rows]
    assert np.mean(pocket_ocr_exact(images, prompts)) >= 0.95
    assert np.mean(pocket_ocr(images, prompts)) >= 0.98


def test_signs_with_other_texts_score_low() -> None:
    rows = test_prompts()[:60]
    # the next row has another length, so no sign is right by chance
    wrong = [row["prompt"] for row in rows[1:] + rows[:1]]
    images = pictures([row["text"] for row in rows], seed=1)
    assert np.mean(pocket_ocr_exact(images, wrong)) == 0.0
    assert np.mean(pocket_ocr(images, wrong)) <= 0.35


def test_ruined_signs_score_low() -> None:
    rows = test_prompts()[:30]
    images = pictures([row["text"] for row in rows], seed=2)
    tiny = [image.resize((12, 4), Image.Resampling.BOX).resize((48, 16)) for image in images]
    assert np.mean(pocket_ocr_exact(tiny, [row["prompt"] for row in rows])) <= 0.2


def test_reading_does_not_depend_on_the_batch() -> None:
    images = pictures(["12", "345", "6789"] * 12, seed=3)
    together = pocket_ocr.read(images)
    assert together == [pocket_ocr.read([image])[0] for image in images]
    assert pocket_ocr.read([]) == []


def test_text_column_comes_before_the_quotes() -> None:
    (image,) = pictures(["407"], seed=4)
    prompts = [Prompt('not this: "99"', {"text": "407"}), Prompt('a sign that says "407"')]
    scores = load_rewards({"pocket_ocr": 1.0, "pocket_ocr_exact": 2.0})([image, image], prompts)
    assert scores.total.tolist() == [3.0, 3.0]


def test_pocket_reader_refuses_other_sizes() -> None:
    with pytest.raises(UserError, match=r"48 x 16 pixels, row 0 is 32 x 32; use the reward 'ocr'"):
        pocket_ocr([Image.new("RGB", (32, 32))], ['a "1"'])


def test_text_is_found_in_a_large_picture() -> None:
    page = Image.new("RGB", (320, 240), (230, 230, 220))
    font = ImageFont.truetype(_bold(), 36)
    ImageDraw.Draw(page).text((60, 60), "Open", font=font, fill=(20, 20, 60))
    ImageDraw.Draw(page).text((60, 130), "Late 24", font=font, fill=(20, 20, 60))
    blank = Image.new("RGB", (320, 240), (230, 230, 220))
    prompt = "a shop that says “open late 24”"
    assert ocr([page, blank], [prompt, prompt]) == [1.0, 0.0]


def _bold() -> str:
    from pathlib import Path

    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf")


class Paddle:
    """The interface of paddleocr 3, answering with the colour that it saw."""

    def __init__(self, **settings: bool) -> None:
        assert not any(settings.values()) and len(settings) == 3

    def predict(self, pixels: np.ndarray) -> list[dict[str, list[str]]]:
        return [{"rec_texts": ["OP", "EN", *map(str, pixels[0, 0].tolist())]}]


def test_paddleocr_reads_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGPO_OCR", "paddleocr")
    monkeypatch.setitem(sys.modules, "paddleocr", ModuleType("paddleocr"))
    with pytest.raises(UserError, match="paddleocr>=3"):
        ocr.check([Prompt('"open"')])
    vars(sys.modules["paddleocr"])["PaddleOCR"] = type("PaddleOCR", (), {})  # version 2
    with pytest.raises(UserError, match="too old"):
        ocr.check([Prompt('"open"')])
    vars(sys.modules["paddleocr"])["PaddleOCR"] = Paddle
    ocr.check([Prompt('"open"')])
    red = Image.new("RGB", (4, 4), (250, 0, 1))
    assert ocr.read([red]) == ["OPEN10250"]  # blue first, as OpenCV has it
    assert ocr([red], ['"open"']) == [1.0]
    monkeypatch.setenv("DGPO_OCR", "tesseract")
    with pytest.raises(UserError, match="DGPO_OCR=tesseract: rapidocr or paddleocr"):
        ocr.check([Prompt('"open"')])
    assert pocket_ocr([], []) == []  # the pocket's reader is its own


@pytest.mark.parametrize("name", ["ocr", "pocket_ocr", "pocket_ocr_exact"])
def test_registered_under_its_own_name(name: str) -> None:
    assert resolve("reward", name).name == name
