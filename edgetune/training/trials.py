"""The file of a search's trials: JSON lines, one for each trial that has ended."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.training.checkpoint import check_origin


@dataclass
class TrialFile:
    """The trials so far, and the file that they stand in. Its first line says of which search."""

    path: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    chosen: dict[str, Any] | None = None  # settings; None: the search goes on

    @classmethod
    def open(cls, path: Path, origin: Mapping[str, str], *, resume: bool) -> TrialFile:
        """A new file, or with `resume` the one that is there. Raises where it is of another recipe
        or other data.
        """
        opened = cls(path)
        lines = _lines(path) if resume else []
        if lines and lines[0].get("kind") == "search":
            check_origin(lines[0]["origin"], origin, where=path.parent)
            opened.records = [line for line in lines if line["kind"] == "trial"]
            opened.chosen = next(
                (line["settings"] for line in lines if line["kind"] == "chosen"), None
            )
            # what a kill left half written goes
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        else:
            path.write_text("", encoding="utf-8")
            opened._append({"kind": "search", "origin": dict(origin)})
        return opened

    @property
    def seconds(self) -> float:
        """Of all trials."""
        return math.fsum(record["seconds"] for record in self.records)

    @property
    def metric(self) -> str:
        """By which they are compared; empty where nothing was measured."""
        return next((record["metric"] for record in self.records if record["metric"]), "")

    def add(self, record: Mapping[str, Any], *, metric: str) -> None:
        """One more trial."""
        line = {"kind": "trial", **record, "metric": metric}
        self.records.append(line)
        self._append(line)

    def choose(self, settings: Mapping[str, Any]) -> None:
        """The search is over."""
        self.chosen = dict(settings)
        self._append({"kind": "chosen", "settings": self.chosen})

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
