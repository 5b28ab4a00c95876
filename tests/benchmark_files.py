"""The programs of ``benchmarks``, which are in no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def benchmark(name: str) -> ModuleType:
    """``benchmarks/NAME.py``, loaded anew."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))  # as when it runs as a program
    place = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    sys.modules[name] = module  # where dataclasses look for it
    if str(BENCHMARKS) not in sys.path:  # a program of theirs finds its neighbours
        sys.path.append(str(BENCHMARKS))
    place.loader.exec_module(module)
    return module
