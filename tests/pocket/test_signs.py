"""Signs: what is drawn, and that training never sees the held-out numbers."""

import numpy as np
import pytest

from dgpo.pocket import signs
from dgpo.pocket.signs import LENGTHS, caption, numbers
from dgpo.rewards.quotes import quoted
from tools.pretrain.sign_drawing import Sign, draw_sign, render


def test_numbers_are_split_without_overlap() -> None:
    for length, total in zip(LENGTHS, (100, 1000, 10000), strict=True):
        seen, held = set(numbers(length, False)), set(numbers(length, True))
        assert not seen & held
        assert len(seen) + len(held) == total
        assert len(held) == total // 5
        assert all(len(text) == length for text in seen | held)


def test_prompt_sets() -> None:
    train, test = signs.train_prompts(), signs.test_prompts()
    trained = {row["text"] for row in train}
    assert len(trained) == 80 + 800 + 8000
    assert len(test) == 300
    assert not trained & {row["text"] for row in test}
    assert len({row["seed"] for row in test}) == 300
    for rows in (train, test):
        counts = np.bincount([len(row["text"]) for row in rows])[2:]
        assert len(set(counts.tolist())) == 1  # each length equally often
        assert all(row["prompt"] == caption(row["text"]) for row in rows)
    assert quoted(test[0]["prompt"]) == [test[0]["text"]]
    # fixed for ever: published numbers refer to these rows
    assert [row["text"] for row in test[:6]] == FIRST


FIRST = ["54", "002", "2508", "33", "105", "0602"]


def test_same_sign_same_picture_and_all_inside() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_sign(text, rng) for text in ("0000", "4444", "8888", "11", "73") * 20]
    pixels = render(drawn)
    assert pixels.shape == (100, 16, 48, 3) and pixels.dtype == np.uint8
    assert (render(drawn[7:9]) == pixels[7:9]).all()
    edge = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    assert (edge == 225).all()


def test_ink_reaches_its_colour_and_covers_the_digits_area() -> None:
    (picture,) = render([Sign("8", x=24, y=8, size=14, ink=(10, 20, 30))])
    dark = picture[(picture != 225).any(-1)]
    assert (dark >= (10, 20, 30)).all()
    assert dark.min(0).tolist() == [10, 20, 30]
    rows, columns = np.nonzero((picture != 225).any(-1))
    # centred, 0.73 em high
    assert abs((rows.min() + rows.max() + 1) / 2 - 8) <= 0.5
    assert abs((columns.min() + columns.max() + 1) / 2 - 24) <= 0.5
    assert 10 <= rows.max() - rows.min() + 1 <= 12


def test_moving_a_sign_by_a_pixel_moves_its_picture() -> None:
    still = Sign("25", x=24, y=8, size=13, ink=(0, 0, 0))
    here, there = render([still, still._replace(x=25.0)])
    assert (here[:, :-1] == there[:, 1:]).all()


@pytest.mark.parametrize("text", ["7", "12345", "4a", "", "٤٢"])
def test_refuses_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match="2 to 4 digits"):
        draw_sign(text, np.random.default_rng(0))


def test_no_signs_no_pictures() -> None:
    assert render([]).shape == (0, 16, 48, 3)
