from __future__ import annotations

import pickle

from dgpo.errors import MissingExtra, UserError


def test_a_missing_extra_says_how_to_install_it():
    error = MissingExtra("rapidocr", "ocr")
    assert isinstance(error, UserError) and isinstance(error, ValueError)
    assert str(error) == "needs rapidocr: pip install 'dgpo[ocr]'"


def test_errors_cross_process_borders():
    error = pickle.loads(pickle.dumps(MissingExtra("rapidocr", "ocr")))
    assert str(error) == "needs rapidocr: pip install 'dgpo[ocr]'"
