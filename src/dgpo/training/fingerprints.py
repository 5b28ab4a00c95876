"""Fingerprints of what a run learns from: prompt rows, and the files of the user's own rewards.

Processes compare them when they begin, and a run that goes on compares them with those in its
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from dgpo.errors import UserError
from dgpo.preferences import RankedGroup
from dgpo.prompts import Prompt
from dgpo.prompts.caption import PICTURES

Fingerprint = dict[str, Any]
"""``source``: the path or name that the recipe gives, None for what came from Python; ``sha256``:
of the content; ``rows``: how many, None for a file."""
_READ = 1 << 20
"""The bytes of a picture's file that are read: most have no more."""


def of_rows(source: str | None, rows: Iterable[Prompt]) -> Fingerprint:
    """Return the fingerprint of prompt rows: texts, metadata and pictures, in their order.

    Where pictures lie does not count; what is in them does.

    Args:
        source: where the rows come from.
        rows: all of them.
    """
    digest, count = hashlib.sha256(), 0
    for row in rows:
        metadata = {k: _file(v) if k in PICTURES else v for k, v in row.metadata.items()}
        said = [row.text, metadata]
        if isinstance(row, RankedGroup):
            said += [row.rewards, [_file(image) for image in row.images]]
        digest.update(json.dumps(_plain(said), sort_keys=True).encode() + b"\n")
        count += 1
    return {"source": source, "sha256": digest.hexdigest(), "rows": count}


def of_file(digest: str) -> Fingerprint:
    """Return the fingerprint of a file whose SHA-256 is known."""
    return {"source": None, "sha256": digest, "rows": None}


def compared(
    saved: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint], folder: Path
) -> list[str]:
    """Compare what a run goes on with to what its checkpoint was made with.

    A source that the recipe names anew is meant to differ, and is told with the recipe's changes.

    Args:
        saved: the fingerprints in the checkpoint, by the recipe's keys; those of an earlier version
            of dgpo may be none.
        now: the fingerprints of what is there.
        folder: the checkpoint.

    Returns:
        A line for each file of a reward that has changed.

    Raises:
        UserError: other rows stand where the rows of the run stood.
    """
    warnings = []
    for key, had in saved.items():
        here = now.get(key)
        if here is None or here["sha256"] == had["sha256"]:
            continue
        if 0 in (had["rows"], here["rows"]):
            continue  # nothing was held out, or nothing is any more
        if had["rows"] is None:
            warnings.append(
                f"warning: {key}: the file of this reward is another than when {folder} was saved"
            )
        elif here["source"] == had["source"]:
            place = f"{key} = {here['source']}" if here["source"] else f"{key} (rows from Python)"
            raise UserError(
                f"resume: {place}: these {here['rows']} rows are not the {had['rows']} that the "
                f"run in {folder.parent.parent} was trained on. Bring those back; or, to go on "
                f"with these, give them as a file of another name: {key}=FILE"
            )
    return warnings


def _file(given: Any) -> Any:
    """Return what stands for a picture: it may be in memory."""
    if not isinstance(given, (str, Path)):
        return given
    with Path(given).open("rb") as stream:
        start = stream.read(_READ)
    return [Path(given).stat().st_size, hashlib.sha256(start).hexdigest()]


def _plain(value: Any) -> Any:
    """Return JSON that is the same in every process."""
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(own) for own in value)
    if isinstance(value, Image.Image):
        return [value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest()]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = str(value)
    # an address in memory says nothing of the value
    return type(value).__qualname__ if " at 0x" in text and not isinstance(value, str) else text
