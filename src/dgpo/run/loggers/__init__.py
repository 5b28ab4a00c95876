"""Loggers: where a run's figures, pictures and tables go beside its own folder."""

from dgpo.run.loggers.base import LoggedRun, Logger

__all__ = ["LoggedRun", "Logger"]
