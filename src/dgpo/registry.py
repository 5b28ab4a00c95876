"""Names that recipes and commands may use, and where each one lives; nothing is imported for it.

Everywhere a name is accepted, ``package.module:attribute`` and ``path/to/file.py:attribute`` are
accepted too, so that an algorithm, reward or prompt set of the user's own needs no registration.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from dgpo.errors import UserError

ALGORITHMS: dict[str, str] = {
    "dgpo": "dgpo.algorithms.dgpo:DGPO",
    "diffusion_nft": "dgpo.algorithms.diffusion_nft:DiffusionNFT",
    "awm": "dgpo.algorithms.awm:AWM",
    "diffusion_dpo": "dgpo.algorithms.diffusion_dpo:DiffusionDPO",
    "crd": "dgpo.algorithms.crd:CRD",
    "rwr": "dgpo.algorithms.rwr:RWR",
    "best_of_n": "dgpo.algorithms.best_of_n:BestOfN",
    "flow_grpo": "dgpo.algorithms.flow_grpo:FlowGRPO",
    "grpo_guard": "dgpo.algorithms.grpo_guard:GRPOGuard",
    "flow_dppo": "dgpo.algorithms.flow_dppo:FlowDPPO",
    "ddpo": "dgpo.algorithms.ddpo:DDPO",
}
REWARDS: dict[str, str] = {
    "pocket_geneval": "dgpo.rewards.shipped.pocket:pocket_geneval",
    "pocket_geneval_strict": "dgpo.rewards.shipped.pocket:pocket_geneval_strict",
    "pocket_match": "dgpo.pocket.measures:match",
    "pocket_quality": "dgpo.pocket.measures:quality",
    "pocket_kid": "dgpo.pocket.measures:pocket_kid",
    "pocket_ocr": "dgpo.rewards.shipped.ocr:pocket_ocr",
    "pocket_ocr_exact": "dgpo.rewards.shipped.ocr:pocket_ocr_exact",
    "ocr": "dgpo.rewards.shipped.ocr:ocr",
    "geneval": "dgpo.rewards.shipped.geneval:geneval",
    "geneval_strict": "dgpo.rewards.shipped.geneval:geneval_strict",
    "pickscore": "dgpo.rewards.shipped.pickscore:pickscore",
    "hpsv2": "dgpo.rewards.shipped.hpsv2:hpsv2",
    "hpsv3": "dgpo.rewards.shipped.hpsv3:hpsv3",
    "image_reward": "dgpo.rewards.shipped.image_reward:image_reward",
    "clip": "dgpo.rewards.shipped.clip:clip",
    "vqascore": "dgpo.rewards.shipped.vqascore:vqascore",
    "unified_reward": "dgpo.rewards.shipped.unified_reward:unified_reward",
    "vlm_judge": "dgpo.rewards.shipped.vlm_judge:vlm_judge",
    "aesthetic": "dgpo.rewards.shipped.aesthetic:aesthetic",
    "deqa": "dgpo.rewards.shipped.deqa:deqa",
    "jpeg_compressibility": "dgpo.rewards.shipped.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "dgpo.rewards.shipped.jpeg:jpeg_incompressibility",
    "video_clip": "dgpo.rewards.shipped.video:video_clip",
    "video_pickscore": "dgpo.rewards.shipped.video:video_pickscore",
    "video_aesthetic": "dgpo.rewards.shipped.video:video_aesthetic",
    "clap": "dgpo.rewards.shipped.clap:clap",
    "http": "dgpo.rewards.shipped.http:HttpReward",
    "human": "dgpo.ranking.human:HumanReward",
    "redness": "dgpo.rewards.shipped.stand_in:redness",
    "brightness": "dgpo.rewards.shipped.stand_in:brightness",
    "variety": "dgpo.rewards.shipped.variety:variety",
}
BENCHMARKS: dict[str, str] = {
    "pocket-geneval": "dgpo.evaluation.benchmarks:POCKET_GENEVAL",
    "pocket-sd-geneval": "dgpo.evaluation.benchmarks:POCKET_SD_GENEVAL",
    "pocket-ocr": "dgpo.evaluation.benchmarks:POCKET_OCR",
    "geneval": "dgpo.evaluation.benchmarks:GENEVAL",
}
MODELS: dict[str, str] = {
    "pocket": "dgpo.pocket:load_pocket",
    "pocket-signs": "dgpo.pocket:load_pocket_signs",
    "pocket-sd": "dgpo.pocket:load_pocket_sd",
}
PROMPTS: dict[str, str] = {
    "pocket-geneval/train": "dgpo.pocket.prompts:train_prompts",
    "pocket-geneval/test": "dgpo.pocket.prompts:test_prompts",
    "pocket-ocr/train": "dgpo.pocket.signs:train_prompts",
    "pocket-ocr/test": "dgpo.pocket.signs:test_prompts",
}
LOGGERS: dict[str, str] = {
    "tensorboard": "dgpo.run.loggers.tensorboard:TensorBoardLogger",
    "wandb": "dgpo.run.loggers.wandb:WandbLogger",
    "trackio": "dgpo.run.loggers.trackio:TrackioLogger",
    "swanlab": "dgpo.run.loggers.swanlab:SwanLabLogger",
    "jsonl": "dgpo.run.loggers.jsonl:JsonlLogger",
    "csv": "dgpo.run.loggers.csv:CsvLogger",
}
TABLES: dict[str, dict[str, str]] = {
    "algorithm": ALGORITHMS,
    "reward": REWARDS,
    "benchmark": BENCHMARKS,
    "model": MODELS,
    "prompts": PROMPTS,
    "logger": LOGGERS,
}


def nearest(name: str, valid: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest valid names, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.55)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""


def known(kind: str, name: str) -> bool:
    """Whether a name is registered, or has the form of a path to something of the user's own."""
    return name in TABLES[kind] or ":" in name


def unknown(kind: str, name: str) -> str:
    """The message for a name that is neither: the nearest names, all names, and the way out."""
    table = TABLES[kind]
    return (
        f"unknown {kind} {name!r}{nearest(name, table)}; built in: {', '.join(sorted(table))}; "
        "or name your own as package.module:attribute or path/to/file.py:attribute"
    )


def resolve(kind: str, name: str) -> Any:
    """The object behind a name; its module is imported only now.

    Args:
        kind: ``"algorithm"``, ``"reward"``, ``"benchmark"``, ``"model"``, ``"prompts"`` or
            ``"logger"``.
        name: a registered name, ``package.module:attribute`` or ``path/to/file.py:attribute``.

    Raises:
        UserError: the name is unknown, or what it points at cannot be imported or is not there.
    """
    path = TABLES[kind].get(name, name)
    where, colon, attribute = path.rpartition(":")
    if not colon:
        raise UserError(unknown(kind, name))
    module = _from_file(kind, where) if where.endswith(".py") else _from_name(kind, name, where)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n in vars(module) if not n.startswith("_")]
            raise UserError(f"{kind} {name!r}: {where} has no {part!r}{nearest(part, names)}")
        found = getattr(found, part)
    return found


def _from_name(kind: str, name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except Exception as error:  # the user's module may raise anything while it is imported
        # one line tells a misspelt module from a dependency that is not installed
        raise UserError(f"{kind} {name!r}: importing {where} failed: {_told(error)}") from error


def _told(error: Exception) -> str:
    """An error and, unless something is just not there, where in the user's code it was raised."""
    if isinstance(error, ImportError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _from_file(kind: str, where: str) -> ModuleType:
    try:
        file = Path(where).expanduser().resolve()
        there = file.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name or a home that cannot be
        raise UserError(f"{kind}: no file {where!r:.200}: {error}"[:400]) from error
    if not there:
        raise UserError(f"{kind}: no file {where}")
    name = f"dgpo_user_{file.stem}_{abs(hash(file)):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # registered first: dataclasses and pickling look their module up while it is executed
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception):
            raise UserError(f"{kind}: {where} failed: {_told(error)}") from error
        raise
    return module
