"""Writing so that a kill or a full disk leaves what was there before."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dgpo.errors import UserError

DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a file of a run raises that is not what was written."""
_FULL = ("No space left", "StorageFull", "Disk quota exceeded", "QuotaExceeded")


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed because no space, or no more of the user's share, was left."""
    if isinstance(error, SafetensorError):  # it hides the operating system's reason in a text
        return any(words in str(error) for words in _FULL)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def says_disk_full(folder: Path) -> Iterator[None]:
    """A full disk during the block becomes one clear error.

    Raises:
        UserError: the disk is full; what was saved before is whole.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"the disk of {folder} is full, or your quota of it ({error}). The checkpoints that "
            "were saved before are whole: free some space, or lower checkpoint.keep_last and "
            f"checkpoint.keep_best, and go on with: dgpo train {folder / 'recipe.yaml'} --resume"
        ) from error


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_aside(path: Path) -> Path:
    """Rename what is damaged, so that it is neither read nor counted, nor lost; the new name is the
    first of ``NAME.damaged``, ``NAME.damaged-2``, ... that is free."""
    names = itertools.chain(("damaged",), (f"damaged-{n}" for n in itertools.count(2)))
    places = (path.with_name(f"{path.name}.{name}") for name in names)
    return path.rename(next(place for place in places if not place.exists()))


def replace_text(file: Path, text: str) -> None:
    """Put a text in the place of a file: a kill or a full disk leaves one or the other, whole."""
    whole = file.with_suffix(".tmp")
    try:
        whole.write_text(text, encoding="utf-8")
        sync(whole)
    except BaseException:
        whole.unlink(missing_ok=True)
        raise
    whole.replace(file)


def replace_folder(place: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new folder, and put it in the place of the one of that name.

    Whatever fails or is killed meanwhile, ``place`` is one or the other as a whole, or for the
    moment between two renames ``place.old`` is the earlier one.
    """
    new, old = (place.with_name(f"{place.name}.{age}") for age in ("new", "old"))
    if new.exists():  # left by a run that was killed
        shutil.rmtree(new)
    new.mkdir(parents=True)
    try:
        write(new)
        for file in new.rglob("*"):
            sync(file)
        sync(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # or it would keep a full disk full
        raise
    if place.exists():
        if old.exists():
            shutil.rmtree(old)
        place.rename(old)
    new.rename(place)
    sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)
