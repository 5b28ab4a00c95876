"""The folder in which a run is trained again."""

from __future__ import annotations

from pathlib import Path

from dgpo.disk import first_free
from dgpo.recipe.files import MANIFEST


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
