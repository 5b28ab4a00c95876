"""Files and folders are replaced so that a kill or a full disk leaves the earlier ones whole."""

from __future__ import annotations

import errno
import itertools
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dgpo.errors import UserError

DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""The errors that reading a damaged file of a run may raise."""
CHECKPOINT_TENSORS = "tensors.safetensors"
"""The file of a checkpoint's folder that holds its tensors."""
_FULL = ("No space left", "StorageFull", "Disk quota exceeded", "QuotaExceeded")


def is_disk_full(error: BaseException) -> bool:
    """Return whether a write failed because the disk, or the user's quota of it, is full."""
    if isinstance(error, SafetensorError):  # it hides the operating system's reason in a text
        return any(words in str(error) for words in _FULL)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def resume_command(folder: Path, *more: str) -> str:
    """Return the command that goes on with the run in a folder, as a shell takes it.

    >>> resume_command(Path("runs/a #2"), "train.iterations=9")
    "dgpo train 'runs/a #2/recipe.yaml' --resume train.iterations=9"
    """
    return shlex.join(["dgpo", "train", str(folder / "recipe.yaml"), "--resume", *more])


@contextmanager
def says_disk_full(folder: Path) -> Iterator[None]:
    """Turn a full disk during the block into one clear error.

    Raises:
        UserError: the disk is full; the checkpoints that were saved before are whole.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"the disk of {folder} is full, or your quota of it ({error}). The checkpoints that "
            "were saved before are whole: free some space, or lower checkpoint.keep_last and "
            f"checkpoint.keep_best; then go on with: {resume_command(folder)}"
        ) from error


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder, so that it is not read again and not lost.

    The new name is the first of ``NAME.damaged``, ``NAME.damaged-2``, ... that is free.
    """
    return path.rename(first_free(path.with_name(f"{path.name}.damaged")))


def first_free(place: Path) -> Path:
    """Return the first of ``place``, ``place-2``, ``place-3``, ... that does not exist."""
    others = (place.with_name(f"{place.name}-{n}") for n in itertools.count(2))
    return next(path for path in itertools.chain([place], others) if not path.exists())


def append_line(file: Path, line: str) -> None:
    """Write a line at the end of a file; it is on the disk when this returns."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def replace_text(file: Path, text: str) -> None:
    """Replace a file by a text, as :func:`replace_file` does."""
    replace_file(file, lambda whole: whole.write_text(text, encoding="utf-8"))


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new file, then replace ``file`` by it.

    A kill or a full disk leaves the old file or the new one, whole.
    """
    whole = file.with_suffix(".tmp")
    try:
        write(whole)
        sync(whole)  # first: the new name could reach the disk before the content does
    except BaseException:
        whole.unlink(missing_ok=True)
        raise
    whole.replace(file)


def replace_folder(place: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new folder, then replace the folder ``place`` by it.

    Whatever fails or is killed meanwhile, ``place`` is the old folder or the new one, whole. Only
    between the two renames is there no ``place``; then ``place.old`` is the old folder.
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
    # no folder can be renamed onto another: the earlier one steps aside until the new one stands
    if place.exists():
        if old.exists():
            shutil.rmtree(old)
        place.rename(old)
    new.rename(place)
    sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)
