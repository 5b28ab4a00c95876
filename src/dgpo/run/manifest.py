"""``run.json``: the command, versions and machine that made a run, and what differs here."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dgpo.disk import DAMAGED, first_free, replace_text
from dgpo.errors import UserError
from dgpo.recipe.files import MANIFEST
from dgpo.secrets import masked_words

_PACKAGES = ("dgpo", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy")
_MACHINE = ("processor", "cpu_capability", "torch_threads", "gpus")
"""The facts of a machine that may change the last bits of a number."""


def record_start(folder: Path, seed: int, iteration: int) -> None:
    """Add a start of the run (the first one, or a resume) to ``run.json``.

    Args:
        folder: the run folder.
        seed: the recipe's seed; every random number of the run comes from it.
        iteration: iterations done before this start.

    Raises:
        UserError: ``run.json`` is there and is damaged.
    """
    file = folder / MANIFEST
    try:
        starts = json.loads(file.read_text(encoding="utf-8"))["starts"] if file.exists() else []
        if not isinstance(starts, list):
            raise ValueError("its starts are not a list")
    except DAMAGED as error:
        raise UserError(f"{file} is damaged ({error}); delete it, it is a record only") from error
    starts.append({"iteration": iteration, "seed": seed, **facts()})
    replace_text(file, json.dumps({"starts": starts}, indent=2) + "\n")


def read_starts(file: Path) -> list[dict[str, Any]]:
    """Read the starts of a run from its ``run.json``, the first one first.

    Raises:
        UserError: the file is missing or is no ``run.json``.
    """
    if not file.is_file():
        raise UserError(
            f"{str(file)!r} is no file; give the {MANIFEST} of a run folder, or a recipe"
        )
    try:
        starts = json.loads(file.read_text(encoding="utf-8"))["starts"]
        wrong = not starts or not all(
            isinstance(start["versions"], dict) and isinstance(start.get("machine", {}), dict)
            for start in starts
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        wrong, starts = True, []
    if wrong:
        raise UserError(
            f"{str(file)!r} is no manifest of a run: give the {MANIFEST} of a run folder, with "
            "which the run is trained again, or a recipe"
        )
    return starts


def differences(starts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what differs here from the starts of a run, in one sentence for each difference.

    Versions are compared, and the facts of the machine that may change the last bits of a number.
    """
    here = _compared(facts())
    had: dict[str, list[Any]] = {}
    for start in starts:
        for name, value in _compared(start).items():
            had.setdefault(name, []).append(value)
    return [
        f"{name}: the run was made with {' and '.join(dict.fromkeys(map(_said, values)))}, "
        f"here it is {_said(here.get(name))}"
        for name, values in had.items()
        if any(value != here.get(name) for value in values)
    ]


def free_folder(manifest: Path) -> Path:
    """Choose a folder that does not exist for the repetition of a run.

    It is ``RUN-repeat`` beside the folder ``RUN``, or ``RUN-repeat-2``, and so on. For a
    ``NAME-run.json``, which lies in no run folder, it is in ``runs``.

    Args:
        manifest: the run's ``run.json``.
    """
    name = manifest.name.removesuffix(MANIFEST).rstrip("-")
    run = Path("runs") / name if name else manifest.parent
    if run.name in ("", ".."):
        run = run.resolve()
    return first_free(run.with_name(f"{run.name}-repeat"))


def _compared(start: Mapping[str, Any]) -> dict[str, Any]:
    machine = start.get("machine", {})
    commit = {"the commit of dgpo": start["commit"]} if "commit" in start else {}
    return {**start["versions"], **commit, **{k: machine[k] for k in _MACHINE if k in machine}}


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def facts() -> dict[str, Any]:
    """Collect time, command, versions, commit and machine, without what looks like a secret."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": masked_words(sys.argv),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **versions()},
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that a run depends on; None for one not installed."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> str | None:
    """Find the commit of the checkout that dgpo runs from; ``+changes`` if files differ from it."""
    place = Path(__file__).resolve().parents[1]
    if not any((parent / ".git").exists() for parent in place.parents[:2]):
        return None  # installed: another project's checkout may lie around it

    def git(*words: str) -> str:
        # constant words, and the git that the user has
        done = subprocess.run(  # nosec B603 B607
            ["git", "-C", str(place), *words],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(place))
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None  # no git here: the record says that it is not known


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
