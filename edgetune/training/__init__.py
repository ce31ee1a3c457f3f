"""A recipe becomes a run folder."""

from __future__ import annotations

from edgetune.training.run import run_recipe
from edgetune.training.summary import RunResult, RunSummary

__all__ = ["RunResult", "RunSummary", "run_recipe"]
