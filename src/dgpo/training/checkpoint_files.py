"""Checkpoints: all that the future of a run depends on, as safetensors and JSON.

Random numbers and the order of prompts are functions of the seed and the iteration
(:mod:`dgpo.core.seeds`), so what has to be kept is the weights, their averages, the optimiser and
the counters, and with ``rollout.ahead`` the pictures that earlier weights have made already. A
checkpoint is a folder named by its iteration::

    checkpoints/00000050/tensors.safetensors   weights, averages, moments of the optimiser
    checkpoints/00000050/state.json            counters
    checkpoints/00000050/ahead.safetensors     what was sampled ahead, if anything was
    checkpoints/00000050/manifest.json         size and hash of all, score, base weights

It is written under another name, brought to the disk, and renamed: whatever stops the run, what
has the name is whole. What was damaged later is found by the hashes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dgpo.disk import CHECKPOINT_TENSORS, DAMAGED, replace_folder
from dgpo.distributed.processes import SINGLE, Processes
from dgpo.distributed.sharding import like, put, whole
from dgpo.errors import UserError
from dgpo.training.prefetched import NOTHING, Prefetched
from dgpo.training.tensor_file import described, read
from dgpo.training.updater import Updater

MANIFEST = "manifest.json"
FORMAT = 1
"""The format of a checkpoint's files; it counts up when other code is needed to read them."""
_STATE = "state.json"
_AHEAD = "ahead.safetensors"
_NAME = re.compile(r"(\d{8})(\.old)?")


@dataclass(frozen=True)
class Found:
    """A whole checkpoint.

    Args:
        folder: where it is.
        manifest: what its manifest says.
        damaged: the later ones, each with what is wrong with it and in which file.
    """

    folder: Path
    manifest: dict[str, Any]
    damaged: Mapping[Path, str] = field(default_factory=dict)

    @property
    def iteration(self) -> int:
        """The iterations that were done when it was saved."""
        return self.manifest["iteration"]


def save_checkpoint(
    folder: Path,
    updater: Updater,
    counters: Mapping[str, Any],
    *,
    score: float | None = None,
    base: Mapping[str, str] | None = None,
    data: Mapping[str, Any] | None = None,
    ahead: Prefetched = NOTHING,
) -> Path:
    """Write the checkpoint of an iteration; one of the same iteration is replaced once the new one
    is whole. All processes call this; the main one writes.

    Args:
        folder: the folder of all checkpoints.
        updater: holds what is saved, gathered where it is sharded over processes.
        counters: JSON values, at least ``iteration``.
        score: the score on the held-out prompts at this iteration, if it is known.
        base: :func:`dgpo.models.weights.snapshots.base_fingerprints` before training.
        data: the fingerprints of prompt rows and rewards.
        ahead: pictures of later iterations.

    Raises:
        OSError: it could not be written; the checkpoints before it are as they were.
    """
    place = folder / f"{counters['iteration']:08d}"
    tensors = _tensors(updater)
    if not updater.processes.main:
        return place
    for left in folder.glob("*.new"):  # by a run that was killed
        shutil.rmtree(left)

    def write(new: Path) -> None:
        save_file(tensors, new / CHECKPOINT_TENSORS)
        steps = {"optimizer_step": updater.step, "nonfinite": updater.nonfinite}
        steps |= {"gradient_scale": updater.gradient_scale, "scaled": updater.scaled}
        names = [CHECKPOINT_TENSORS, _STATE]
        if ahead.facts:
            save_file(ahead.tensors, new / _AHEAD)
            steps |= {"ahead": ahead.facts}
            names.append(_AHEAD)
        _write_json(new / _STATE, {**steps, **counters})
        files = {name: _facts(new / name) for name in names}
        manifest = {"format": FORMAT, "iteration": counters["iteration"], "score": score}
        manifest |= {"base": dict(base or {}), "data": dict(data or {}), "files": files}
        _write_json(new / MANIFEST, {**manifest, "sha256": _hash_of(manifest)})

    replace_folder(place, write)
    return place


def prune(folder: Path, keep_last: int, keep_best: int, saved: Path | None = None) -> None:
    """Delete all checkpoints but the last and the best: of equal scores the earlier is better.

    To be called once a checkpoint was saved: what is left of replaced ones is deleted as well.

    Args:
        folder: the folder of all checkpoints.
        keep_last, keep_best: how many.
        saved: the one that was just saved, which is kept although others may be later: a run that
            went back to an earlier iteration is safe by it alone.
    """
    for left in folder.glob("*.old"):
        shutil.rmtree(left, ignore_errors=True)
    iterations = {place: int(place.name) for place in folder.iterdir() if place.name.isdigit()}
    latest = sorted(iterations, key=iterations.__getitem__, reverse=True)
    scores = {place: _score(place) for place in latest}
    scored = {place: score for place, score in scores.items() if score is not None}
    best = sorted(scored, key=lambda place: (-scored[place], iterations[place]))
    kept = {*latest[:keep_last], *best[:keep_best], saved}
    for place in latest:
        if place not in kept:
            # renamed first: a folder with the name of a checkpoint is never half of one
            gone = place.rename(place.with_name(f"{place.name}.old"))
            shutil.rmtree(gone, ignore_errors=True)


def find_checkpoint(folder: Path, best: bool = False) -> Found:
    """The last whole checkpoint of a run, or the one with the best score.

    Args:
        folder: the folder of all checkpoints.

    Raises:
        UserError: there is none; damaged files are named.
    """

    def order(place: Path) -> tuple[float, int, bool]:
        score = _score(place) if best else None
        iteration = int(place.name[:8])
        kept = not place.name.endswith(".old")
        if best:  # of equal scores the earlier
            return float("-inf") if score is None else score, -iteration, kept
        return 0.0, iteration, kept

    damaged: dict[Path, str] = {}
    for place in sorted(_places(folder), key=order, reverse=True):
        found = _read_manifest(place)
        if not isinstance(found, str):
            _refuse_later_format(place, found)
            return Found(place, found, damaged)
        damaged[place] = found
    if damaged:
        wrong = "; ".join(damaged.values())
        raise UserError(
            f"{folder}: no checkpoint is whole: {wrong}. Bring these files back, or "
            "start anew without --resume (resume=True) in another run.dir"
        )
    raise UserError(
        f"{folder} holds no checkpoint to go on from: start without --resume (resume=True), in "
        "another run.dir if this one holds a run"
    )


def any_checkpoint(folder: Path) -> bool:
    """Return whether a checkpoint was ever finished, whatever has become of its files."""
    return bool(_places(folder))


def load_checkpoint(folder: Path | None, updater: Updater) -> dict[str, Any]:
    """Put a checkpoint's weights, averages and optimiser back; returns its counters. Collective.

    Args:
        folder: ``Found.folder``; only the main process reads it, and tells the others.
        updater: gets it.

    Raises:
        UserError: it belongs to other settings.
    """
    policy, processes = updater.policy, updater.processes
    state, facts = processes.broadcast_object(
        lambda: _contents(folder), "a checkpoint to go on from"
    )
    shapes = {name: tuple(shape) for name, (_, shape) in facts.items()}
    policy.refuse_other({n: shape for n, shape in shapes.items() if not n.startswith("optimizer.")})
    own = policy.state_dict()
    moments: dict[int, dict[str, Tensor]] = {}
    # one by one: sharded weights need not fit whole into the memory of a process
    for name, value in read(folder and folder / CHECKPOINT_TENSORS, facts, processes):
        if name in own:
            put(own[name], value)
            continue
        _, place, field = name.split(".", 2)
        parameter = updater.parameters[int(place)]
        same = value.shape == parameter.shape  # the number of steps is one for all pieces
        moments.setdefault(int(place), {})[field] = like(parameter, value) if same else value
    updater.optimizer.load_state_dict({**updater.optimizer.state_dict(), "state": moments})
    updater.step, updater.nonfinite = state["optimizer_step"], state["nonfinite"]
    updater.gradient_scale = state.get("gradient_scale", updater.gradient_scale)
    updater.scaled = state.get("scaled", 0)
    return state


def load_ahead(
    folder: Path | None, state: Mapping[str, Any], processes: Processes = SINGLE
) -> Prefetched:
    """The pictures of later iterations that a checkpoint holds. Collective.

    Args:
        folder: see :func:`load_checkpoint`.
        state: what that one has returned.
    """
    if not state.get("ahead"):
        return NOTHING
    file = folder and folder / _AHEAD
    facts = processes.broadcast_object(lambda: described(file), "what was sampled ahead")
    return Prefetched(dict(read(file, facts, processes)), state["ahead"])


def refuse_other_base(found: Found, base: Mapping[str, str]) -> None:
    """Refuse to go on with a pipeline whose untrained weights are not those of the run.

    Raises:
        UserError: they are not, e.g. because the pipeline has been trained already.
    """
    began = found.manifest["base"]
    other = sorted(name for name in began if base.get(name) != began[name])
    if other:
        raise UserError(
            f"resume: the weights of {', '.join(other)} are not those that the run in "
            f"{found.folder.parent.parent} began with. What was trained goes "
            "on top of the untrained model: give a pipeline that was just loaded, not one that was "
            "trained or has a LoRA, of the same model and precision"
        )


def _places(folder: Path) -> list[Path]:
    """The folders with the name of a checkpoint, which a half-written one has not."""
    return [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []


def _tensors(updater: Updater) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole, in the main process. Collective if some are sharded."""
    tensors = updater.policy.state_dict() | {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, state in updater.optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if updater.processes.main:
            kept[name] = gathered.cpu().contiguous()
    return kept


def _contents(folder: Path | None) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The counters of a checkpoint, and dtype and shape of every tensor."""
    assert folder is not None, "the main process knows the folder"
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    return state, described(folder / CHECKPOINT_TENSORS)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _facts(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _hash_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _score(place: Path) -> float | None:
    """What the manifest says, without a look at the files; None as well if it cannot be read."""
    try:
        return json.loads((place / MANIFEST).read_text(encoding="utf-8"))["score"]
    except DAMAGED:
        return None  # whoever loads it is told


def _refuse_later_format(place: Path, manifest: Mapping[str, Any]) -> None:
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{place / MANIFEST}: format {manifest['format']!r:.40}, and this version of dgpo "
            f"reads {FORMAT}: go on with the version that has written the run (run.json names it)"
        )


def _read_manifest(place: Path) -> dict[str, Any] | str:
    """The manifest of a whole checkpoint, or what is wrong with it."""
    file = place / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        claimed = manifest.pop("sha256")
        if claimed != _hash_of(manifest):
            raise ValueError("its content is not what was written")
    except DAMAGED as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        return f"{file} {why}"
    for name, wanted in manifest["files"].items():
        part = place / name
        if not part.is_file():
            return f"{part} is missing"
        if (size := part.stat().st_size) != wanted["bytes"]:
            return f"{part} has {size} bytes, not {wanted['bytes']}"
        if _facts(part) != wanted:
            return f"{part} is damaged: its hash is not that of the manifest"
    return manifest
