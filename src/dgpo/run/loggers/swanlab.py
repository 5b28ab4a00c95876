"""SwanLab."""

from __future__ import annotations

import os
from typing import Any

from dgpo.run.loggers.base import LoggedRun
from dgpo.run.loggers.package import PackageLogger


class SwanLabLogger(PackageLogger):
    """Logs to SwanLab; the options are arguments of ``swanlab.init``."""

    name = "swanlab"

    def end(self, failed: bool) -> None:
        why = "an error ended the run" if failed else None
        self._run.finish(state="crashed" if failed else "success", error=why)

    def _init(self, run: LoggedRun) -> dict[str, Any]:
        own = {"project": os.environ.get("SWANLAB_PROJ_NAME", "dgpo"), "name": run.name}
        log_dir = str(run.folder / "swanlog")
        return {**own, "log_dir": log_dir, **self._options, "id": run.id, "resume": "allow"}

    def _table(self, columns: list[str], rows: list[list[Any]]) -> Any:
        return self._package.echarts.Table().add(columns, rows)
