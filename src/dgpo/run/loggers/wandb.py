"""Weights & Biases."""

from __future__ import annotations

import os
from typing import Any

from dgpo.run.loggers.base import LoggedRun
from dgpo.run.loggers.package import PackageLogger


class WandbLogger(PackageLogger):
    """Logs to Weights & Biases; the options are arguments of ``wandb.init``."""

    name = "wandb"

    def begin(self, run: LoggedRun) -> None:
        super().begin(run)
        # the tracker's own step never goes back, and would refuse what a resumed run logs again
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def end(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _init(self, run: LoggedRun) -> dict[str, Any]:
        own = {"project": os.environ.get("WANDB_PROJECT", "dgpo"), "name": run.name}
        resume = None if run.resumed_after is None else "allow"
        return {**own, "dir": str(run.folder), **self._options, "id": run.id, "resume": resume}

    def _log(self, values: dict[str, Any], step: int) -> None:
        self._run.log({"iteration": step, **values})
