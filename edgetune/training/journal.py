"""metrics.jsonl: a line per logged step and per validation; and the same as curves where TensorBoard is installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.training.curves import Curves, open_curves


class Journal:
    """Appends records to a file and keeps them for the report.

    `path` is in the folder of the run in progress; None writes nowhere (all processes but the leader). A resumed run
    begins with the records of its checkpoint. `curves` names the folder of TensorBoard's files.
    """

    def __init__(
        self, path: Path | None, *, records: Sequence[dict[str, Any]] = (), curves: Path | None = None
    ) -> None:
        self.path = path
        self.records = list(records)
        self.curves: Curves | None = None if curves is None else open_curves(curves)
        if path is not None:
            path.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")
        if self.curves is not None:
            for record in self.records:
                self.curves.add(record)

    def write(self, **record: Any) -> None:
        """Add one record; floats are rounded to 7 significant digits."""
        rounded = {key: float(f"{value:.7g}") if isinstance(value, float) else value for key, value in record.items()}
        self.records.append(rounded)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rounded) + "\n")
        if self.curves is not None:
            self.curves.add(rounded)

    def last(self, kind: str) -> dict[str, Any] | None:
        """The latest record of a kind."""
        return next((record for record in reversed(self.records) if record["kind"] == kind), None)

    def close(self) -> None:
        """Finish TensorBoard's files."""
        if self.curves is not None:
            self.curves.close()

    def copy_to(self, folder: Path) -> None:
        """Put the files into the finished run's folder, under their own names."""
        if self.path is not None:
            shutil.copyfile(self.path, folder / self.path.name)
        if self.curves is not None:
            shutil.copytree(self.curves.folder, folder / self.curves.folder.name)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records of a finished run."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
