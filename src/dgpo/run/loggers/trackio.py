"""Trackio, which keeps runs on this machine or in a Space of the hub."""

from __future__ import annotations

from typing import Any

from dgpo.run.loggers.base import LoggedRun
from dgpo.run.loggers.package import PackageLogger


class TrackioLogger(PackageLogger):
    """Logs to Trackio; the options are arguments of ``trackio.init``."""

    name = "trackio"

    def end(self, failed: bool) -> None:
        self._package.finish()  # of the module: it also forgets its current run

    def _init(self, run: LoggedRun) -> dict[str, Any]:
        given = {"project": "dgpo", "name": run.name, **self._options}
        # Trackio finds a run by its name alone: with the id in it, no other run has this name
        given["name"] = f"{given['name']}-{run.id}"
        return {**given, "resume": "never" if run.resumed_after is None else "allow"}
