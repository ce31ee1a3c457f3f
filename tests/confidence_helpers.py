"""An encoder's run that knows how sure it is, on rows of which some are labelled wrongly."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from export_helpers import export
from training_helpers import INTENTS, ROOMS, recipe, silent, write_rows

from edgetune.recipe.confidence import ConfidenceSettings
from edgetune.recipe.schema import Recipe
from edgetune.training import run_recipe

MORE = ("cellar", "attic", "garage", "office", "bath", "study", "porch", "shed", "loft", "den")


def rows(rooms: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {"text": text.format(room), "label": label}
        for room in rooms
        for label, text in INTENTS.items()
    ]


def intents(base: Path, folder: Path, **confidence: Any) -> Recipe:
    """Trained on four rooms, measured on 30 rows of ten others, of which some have a wrong
    label: there is something to be unsure of.
    """
    held_out = rows(MORE)
    for row in held_out[::7]:
        row["label"] = "music" if row["label"] != "music" else "heat"
    train = write_rows(folder / "train.jsonl", rows(ROOMS))
    validation = write_rows(folder / "dev.jsonl", held_out)
    settings = ConfidenceSettings(**confidence) if confidence else None
    made = recipe(base, "sequence-classification", train, validation, epochs=6)
    return replace(made, confidence=settings)


@cache
def trained(base: Path) -> Path:
    """A run whose threshold answers four fifths of the rows, and its bundle beside it."""
    folder = base.parent / f"{base.name}-confidence"
    folder.mkdir()
    run_recipe(intents(base, folder, answered=0.8), out=folder / "run", progress=silent())
    export(folder / "bundle", folder / "run")
    return folder


def told(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "adapter" / "edgetune_adapter.json").read_text())
    return found["confidence"]
