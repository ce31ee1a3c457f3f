"""The journal as TensorBoard curves, where the package `tensorboard` is installed; `tensorboard --logdir runs` shows them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOT_A_CURVE = ("kind", "stage", "step")


class Curves:
    """Writes every number of a record as a point; a stage's steps are its own, so its curves are called `stage0/…`."""

    def __init__(self, folder: Path, writer: Any) -> None:
        self.folder, self.writer = folder, writer

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record of the journal: `{"kind", "stage", "step"}` and numbers."""
        for name, value in record.items():
            if name not in NOT_A_CURVE and isinstance(value, (int, float)):
                self.writer.add_scalar(f"stage{record['stage']}/{record['kind']}/{name}", value, record["step"])
        self.writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


def open_curves(folder: Path) -> Curves | None:
    """Curves in an empty `folder`; None where TensorBoard is not installed, or too old for torch."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined,unused-ignore]
    except ImportError:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    return Curves(folder, SummaryWriter(str(folder)))  # type: ignore[no-untyped-call,unused-ignore]
