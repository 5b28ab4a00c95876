"""Rewards that read: how much of the wanted text an OCR engine finds in a picture.

The engine is RapidOCR (PP-OCRv4 models run by onnxruntime; the models are in its wheel); with
``DGPO_OCR=paddleocr`` in the environment ``ocr`` reads with PaddleOCR, never without being told.
Licence: engines and models Apache-2.0. Range [0, 1], higher is better.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from dgpo.errors import MissingExtra, UserError
from dgpo.pictures import rgb
from dgpo.pocket.signs import HEIGHT, WIDTH
from dgpo.prompts import Prompt
from dgpo.rewards.reward import Media
from dgpo.rewards.rows import RowReward
from dgpo.rewards.shipped import paddle

VARIABLE = "DGPO_OCR"
ENGINES = ("rapidocr", "paddleocr")
_DOUBLE = re.compile(r"""["“”„]([^"“”„]*)["“”]""")
# A single quote inside a word is an apostrophe: an opening one follows no letter, a closing one
# precedes none.
_SINGLE = re.compile(r"(?<!\w)['‘](.*?)['’](?!\w)")


def compact(text: str) -> str:
    """Text as it is compared: without white space, in lower case."""
    return "".join(text.split()).lower()


def quoted(prompt: str) -> str | None:
    """The first quoted string of a prompt: in double quotes (``"``, ``“ ”``), else in single ones.

    Quotes with nothing but space between them do not count.
    """
    for pattern in (_DOUBLE, _SINGLE):
        for found in pattern.finditer(prompt):
            if compact(found[1]):
                return found[1]
    return None


def wanted_text(name: str, where: str, prompt: str, text: Any = None) -> str:
    """Find what a picture should say: the row's ``text`` where it has one, else what is quoted.

    Args:
        name: the reward's name.
        where: what an error calls the row.
        prompt, text: what the row says.

    Raises:
        UserError: ``text`` is no text, or the row has neither.
    """
    if text is None:
        text = quoted(prompt)
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

    ``1 - min(L(read, wanted), |wanted|) / |wanted|`` with L the Levenshtein distance, both without
    spaces and in lower case; 1 where ``wanted`` is a part of ``read``.

    Source: the text-rendering reward of Flow-GRPO (arXiv 2505.05470), which the DGPO
    paper (arXiv 2510.08425) uses; the published code has the part rule.

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


def _engine() -> ModuleType:
    try:
        import rapidocr_onnxruntime
    except ImportError as error:
        raise MissingExtra("rapidocr-onnxruntime", "rewards") from error
    return rapidocr_onnxruntime


class LineReader:
    """RapidOCR's recogniser alone, for pictures that are one line of text.

    Detection costs ten times as much and small signs need none. Pictures are stretched to
    ``height`` x ``width`` pixels and read in batches.

    Args:
        height, width: the size that pictures are scaled to; the recogniser was made for a height of
            48, and its time is proportional to height x width.
        threads: how many threads onnxruntime uses.
        batch: how many pictures are read at once.

    Raises:
        MissingExtra: the extra ``rewards`` is not installed.
    """

    def __init__(self, height: int, width: int, threads: int, batch: int = 32) -> None:
        model = Path(str(_engine().__file__)).parent / "models" / "ch_PP-OCRv4_rec_infer.onnx"
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # waiting threads that spin would take the cores from the training beside them
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        listed = self._session.get_modelmeta().custom_metadata_map["character"].splitlines()
        self._characters = ["", *listed, " "]  # class 0 is the blank of CTC
        self._size = (height, width)
        self._batch = batch

    def __call__(self, images: np.ndarray) -> list[str]:
        """Read each picture.

        Args:
            images: uint8 [N, H, W, 3], RGB.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(images[..., ::-1])).permute(0, 3, 1, 2)
        texts: list[str] = []
        for part in pixels.split(self._batch):
            scaled = torch.nn.functional.interpolate(part.float(), self._size, mode="bilinear")
            (scores,) = self._session.run(None, {self._input: (scaled / 127.5 - 1).numpy()})
            texts += [self._decode(row) for row in np.asarray(scores).argmax(-1)]
        return texts

    def _decode(self, classes: np.ndarray) -> str:
        """Decode greedily (CTC): repeats are one character, blanks separate and vanish."""
        first = np.concatenate([[True], classes[1:] != classes[:-1]])
        return "".join(self._characters[i] for i in classes[first])


class PageReader:
    """RapidOCR with detection, for pictures with text anywhere; lines from top to bottom.

    Raises:
        MissingExtra: the extra ``rewards`` is not installed.
    """

    def __init__(self, threads: int) -> None:
        # text upside down is not what a prompt asks for: no orientation classifier
        self._read = _engine().RapidOCR(use_cls=False, intra_op_num_threads=threads)

    def __call__(self, image: Image.Image) -> str:
        pixels = np.ascontiguousarray(np.asarray(rgb(image))[..., ::-1])
        lines, _ = self._read(pixels)
        return "".join(line[1] for line in lines or [])


class OCR(RowReward):
    """How much of the wanted text is read in a picture of any size (:func:`ocr_score`)."""

    def __init__(self, name: str = "ocr", score: Callable[[str, str], float] = ocr_score) -> None:
        self.name = name
        self._score = score

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a missing engine, and rows that do not say what should be read.

        Raises:
            UserError: there is such a row.
            MissingExtra: the extra ``rewards`` is not installed.
        """
        self.find_engine()
        super().check(prompts)

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
            _engine()

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        """Read each picture."""
        reader = _paddle_reader() if _by_paddle() else _page_reader(torch.get_num_threads())
        return [reader(image) for image in images]


class PocketOCR(OCR):
    """The same score of the pocket model's signs, which RapidOCR's recogniser reads alone."""

    def find_engine(self) -> None:
        """See that what reads is installed."""
        _engine()

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


_sign_reader = functools.cache(functools.partial(LineReader, *SIGN_INPUT))
_page_reader = functools.cache(PageReader)
_paddle_reader = functools.cache(paddle.PaddleReader)
"""Engines, each loaded once."""


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
