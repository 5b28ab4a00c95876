"""Rewards that read: how much of the wanted text an OCR engine finds in a picture.

The engine is RapidOCR (PP-OCRv4 models run by onnxruntime; the models are in its wheel); with
``DGPO_OCR=paddleocr`` in the environment ``ocr`` reads with PaddleOCR, never without being told.
Licence: engines and models Apache-2.0. Range [0, 1], higher is better.
"""

from __future__ import annotations

import functools
import os
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from dgpo.errors import UserError
from dgpo.pictures import rgb
from dgpo.pocket.signs import HEIGHT, WIDTH
from dgpo.prompts import Prompt
from dgpo.rewards.quotes import folded, quoted
from dgpo.rewards.reward import Media
from dgpo.rewards.rows import RowReward
from dgpo.rewards.shipped import paddle, rapid

VARIABLE = "DGPO_OCR"
ENGINES = ("rapidocr", "paddleocr")
NAMED = 10
"""The most rows that a warning names."""


def compact(text: str) -> str:
    """Text as it is compared: folded, without white space, in lower case."""
    return "".join(folded(text).split()).lower()


def wanted_text(name: str, where: str, prompt: str, text: Any = None) -> str:
    """Find what a picture should say: the row's ``text`` where it has one, else the first text in
    quotes (:func:`dgpo.rewards.quotes.quoted`).

    Args:
        name: the reward's name.
        where: what an error calls the row.
        prompt, text: what the row says.

    Raises:
        UserError: ``text`` is no text, or the row has neither, or its quotes are in doubt.
    """
    if text is None:
        try:
            text, *_ = quoted(prompt) or [None]
        except ValueError as error:
            raise UserError(
                f"reward {name!r}, {where}: {prompt!r:.120}: {error}; give the row a 'text', the "
                "text that is to be read"
            ) from error
        if text is None:
            raise UserError(
                f"reward {name!r}, {where}: {prompt!r:.120} quotes no text to be read; "
                "write it in quotes, as in: a sign that says \"407\", or give the row a 'text'"
            )
    if not isinstance(text, str) or not compact(text):
        raise UserError(
            f"reward {name!r}, {where}: text = {text!r:.80} must be a text with at least "
            'one character, for example "407" (in quotes)'
        )
    return text


def ocr_score(read: str, wanted: str) -> float:
    """Score how well a text was written, from what was read of it.

    ``1 - min(L(read, wanted), |wanted|) / |wanted|`` with L the Levenshtein distance, both as
    :func:`compact` has them; 1 where ``wanted`` is a part of ``read``.

    Source: the text-rendering reward of Flow-GRPO (arXiv 2505.05470), which the DGPO
    paper (arXiv 2510.08425) uses; the published code has the part rule.
    Differs from the paper: NFKC, and quotes and dashes as on a keyboard, on both sides.

    Raises:
        ValueError: the wanted text is empty.
    """
    read, wanted = compact(read), compact(wanted)
    if not wanted:
        raise ValueError("the wanted text is empty")
    if wanted in read:
        return 1.0
    return 1.0 - min(Levenshtein.distance(read, wanted), len(wanted)) / len(wanted)


def exact_score(read: str, wanted: str) -> float:
    """1 where what was read is the wanted text and no more (spaces and case aside), else 0."""
    return float(compact(read) == compact(wanted))


class OCR(RowReward):
    """How much of the wanted text is read in a picture of any size (:func:`ocr_score`)."""

    def __init__(self, name: str = "ocr", score: Callable[[str, str], float] = ocr_score) -> None:
        self.name = name
        self._score = score

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a missing engine, and rows that do not say what should be read.

        A warning names the rows whose text holds characters that the engine does not have, because
        no picture of them can reach 1, and those that quote several texts. They still teach, and
        the published prompts have a few.

        Raises:
            UserError: there is such a row, or the engine has no character of any row.
            MissingExtra: the extra ``rewards`` is not installed.
        """
        self.find_engine()
        beyond, several, blind = [], [], []
        for number, prompt in enumerate(prompts):
            place = prompt.place(number)
            text = self.wish(place, prompt.text, prompt.metadata)
            if unreadable := self.unreadable(text):
                beyond.append(f"{place} ({''.join(sorted(unreadable))})")
                blind += [text] * unreadable.issuperset(_characters(text))
            if prompt.metadata.get("text") is None and len(quoted(prompt.text)) > 1:
                several.append(f"{place} (takes {text!r:.40})")
        if blind and len(blind) == len(prompts):
            raise UserError(
                f"reward {self.name!r}: the reader has no character of any text, such as "
                f"{blind[0]!r:.40}: every score would be 0; take other prompts, or a reward of "
                "your own"
            )
        for rows, said in (
            (beyond, "want characters that the reader does not have, and cannot reach 1"),
            (several, "quote several texts, of which the first is taken"),
        ):
            if rows:
                more = f", and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
                warnings.warn(
                    f"reward {self.name!r}: {len(rows)} of {len(prompts)} rows {said}: "
                    f"{', '.join(rows[:NAMED])}{more}",
                    stacklevel=2,
                )

    def wish(self, where: str, prompt: str, row: Mapping[str, Any]) -> str:
        """The text that should be read.

        Raises:
            UserError: see :func:`wanted_text`.
        """
        return wanted_text(self.name, where, prompt, row.get("text"))

    def score(self, images: Media, wishes: list[str]) -> list[float]:
        """One score for each picture."""
        return [self._score(*pair) for pair in zip(self.read(images), wishes, strict=True)]

    def find_engine(self) -> None:
        """See that what reads is installed."""
        if _by_paddle():
            paddle.engine()
        else:
            rapid.engine()

    def unreadable(self, text: str) -> set[str]:
        """Return the characters of a text that the engine does not have, as far as it says."""
        return set() if _by_paddle() else _unreadable(text)

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        """Read each picture."""
        reader = _paddle_reader() if _by_paddle() else _page_reader(torch.get_num_threads())
        return [reader(image) for image in images]


class PocketOCR(OCR):
    """The same score of the pocket model's signs, which RapidOCR's recogniser reads alone."""

    def find_engine(self) -> None:
        """See that what reads is installed."""
        rapid.engine()

    def unreadable(self, text: str) -> set[str]:
        """Return the characters of a text that RapidOCR does not have."""
        return _unreadable(text)

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        """Read each sign.

        Raises:
            UserError: a picture is not 48 x 16.
        """
        for row, image in enumerate(images):
            if image.size != (WIDTH, HEIGHT):
                raise UserError(
                    f"reward {self.name!r} reads signs of {WIDTH} x {HEIGHT} pixels, row {row} "
                    f"is {image.width} x {image.height}; use the reward 'ocr' for it"
                )
        if not images:
            return []
        return read_signs(np.stack([np.asarray(rgb(image)) for image in images]))


SIGN_INPUT = (32, 112)
"""The height and width at which signs are read: as exact as 48 x 128 on clean ones (1.000 of 1,000
strings), in less than half the time."""


def read_signs(signs: np.ndarray | Tensor) -> list[str]:
    """Read signs, uint8 [N, 16, 48, 3], RGB."""
    return _sign_reader(torch.get_num_threads())(np.asarray(signs))


_sign_reader = functools.cache(functools.partial(rapid.LineReader, *SIGN_INPUT))
_page_reader = functools.cache(rapid.PageReader)
_paddle_reader = functools.cache(paddle.PaddleReader)
"""Engines, each loaded once."""


def _characters(text: str) -> set[str]:
    """Return what is written; a letter and its accent are one character, as in the alphabet."""
    return set("".join(unicodedata.normalize("NFC", text).split()))


def _unreadable(text: str) -> set[str]:
    alphabet = _sign_reader(torch.get_num_threads()).alphabet
    return {one for one in _characters(text) if not alphabet.issuperset(folded(one))}


def _by_paddle() -> bool:
    name = os.environ.get(VARIABLE) or ENGINES[0]
    if name not in ENGINES:
        raise UserError(f"{VARIABLE}={name}: {' or '.join(ENGINES)}")
    return name == "paddleocr"


ocr = OCR()
"""The text-rendering reward for real pictures."""
pocket_ocr = PocketOCR("pocket_ocr")
"""The same score of the pocket model's signs. More digits than are wanted still score 1, as in the
published reward; ``pocket_ocr_exact`` beside it shows whether a policy makes use of that."""
pocket_ocr_exact = PocketOCR("pocket_ocr_exact", exact_score)
"""1 where the sign says the wanted text and no more, else 0."""
