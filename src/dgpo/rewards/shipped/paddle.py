"""PaddleOCR as the reader of the reward ``ocr``, for whoever sets ``DGPO_OCR=paddleocr``.

Licence: engine and models (downloaded at the first use) Apache-2.0. Written for the interface of
paddleocr 3; it has not been run by this project.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from dgpo.errors import UserError
from dgpo.pictures import rgb

INSTALL = "pip install 'paddleocr>=3' paddlepaddle"


def engine() -> Any:
    """Import the class of PaddleOCR's pipeline.

    Raises:
        UserError: the package is not installed, or is older than version 3.
    """
    try:
        from paddleocr import PaddleOCR  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"DGPO_OCR=paddleocr: {error}; {INSTALL}, or unset it") from error
    if not hasattr(PaddleOCR, "predict"):
        raise UserError(f"DGPO_OCR=paddleocr: the installed version is too old; {INSTALL}")
    return PaddleOCR


class PaddleReader:
    """Reads text anywhere in a picture, lines from top to bottom.

    Raises:
        UserError: see :func:`engine`.
    """

    def __init__(self) -> None:
        # pages that are turned or bent, and text upside down, are not what a prompt asks for
        self._ocr = engine()(
            use_doc_orientation_classify=False,
            use_doc_unwarping=False,
            use_textline_orientation=False,
        )

    def __call__(self, image: Image.Image) -> str:
        pixels = np.ascontiguousarray(np.asarray(rgb(image))[..., ::-1])
        return "".join(text for page in self._ocr.predict(pixels) for text in page["rec_texts"])
