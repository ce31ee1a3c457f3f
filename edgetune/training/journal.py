"""metrics.jsonl: a line per logged step and per validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Journal:
    """Appends records to a file and keeps them for the report.

    The file grows inside the run's temporary folder, which gets its final name only when the run is complete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []

    def write(self, **record: Any) -> None:
        """Add one record; floats are rounded to 7 significant digits."""
        rounded = {key: float(f"{value:.7g}") if isinstance(value, float) else value for key, value in record.items()}
        self.records.append(rounded)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")

    def last(self, kind: str) -> dict[str, Any] | None:
        """The latest record of a kind."""
        return next((record for record in reversed(self.records) if record["kind"] == kind), None)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records of a finished run."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
