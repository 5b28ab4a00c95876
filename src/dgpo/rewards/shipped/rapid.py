"""RapidOCR as the reader of the rewards that read: a whole page, or one line alone.

PP-OCRv4 models run by onnxruntime; the models are in its wheel. Licence: engine and models
Apache-2.0.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from dgpo.errors import MissingExtra
from dgpo.pictures import rgb


def engine() -> ModuleType:
    """Import RapidOCR.

    Raises:
        MissingExtra: the extra ``rewards`` is not installed.
    """
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
        model = Path(str(engine().__file__)).parent / "models" / "ch_PP-OCRv4_rec_infer.onnx"
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
        self.alphabet = frozenset(self._characters)
        """The characters that it can read."""
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
        self._read = engine().RapidOCR(use_cls=False, intra_op_num_threads=threads)

    def __call__(self, image: Image.Image) -> str:
        pixels = np.ascontiguousarray(np.asarray(rgb(image))[..., ::-1])
        lines, _ = self._read(pixels)
        return "".join(line[1] for line in lines or [])
