"""The judges of a run: each is trained before the policy as a run of its own, inside the run's
folder, on the base that the policy does not need in memory yet.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetune.core.files import write_json
from edgetune.core.layout import ADAPTERS, CHECKPOINTS, JOURNAL, SUMMARY
from edgetune.core.progress import Progress
from edgetune.recipe.judges import judge_recipe, judges_of
from edgetune.recipe.schema import Recipe
from edgetune.training.checkpoint import judges_in
from edgetune.training.loop import StageResult
from edgetune.training.summary import RunSummary, judge_facts, results_line

Train = Callable[[Recipe, Path], RunSummary]  # (recipe, run folder)


@dataclass(frozen=True)
class Judge:
    """A trained judge: its run folder, where it is now, and what came out."""

    name: str
    stage: int  # of the recipe that it is a part of
    folder: Path
    summary: RunSummary

    @property
    def result(self) -> StageResult:
        """What its stage did, as a stage of the whole recipe."""
        facts = self.summary.stages[0]
        return StageResult(**{name: facts[name] for name in StageResult.__dataclass_fields__})

    def records(self) -> list[dict[str, Any]]:
        """Its journal, as lines of the whole recipe's."""
        lines = (self.folder / JOURNAL).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) | {"stage": self.stage} for line in lines]

    def write(self, run: Path, *, final: Path) -> None:
        """Its folder in the run's, which will be at `final`."""
        place = run / ADAPTERS / self.name
        shutil.copytree(self.folder, place)
        summary = asdict(self.summary) | {"out": str(final / ADAPTERS / self.name)}
        write_json(place / SUMMARY, summary)


@dataclass(frozen=True)
class Judges:
    """All judges of a run, by the number of their stage."""

    found: Mapping[int, Judge]

    @property
    def folders(self) -> dict[str, str]:
        """Where each is now, by name."""
        return {judge.name: str(judge.folder) for judge in self.found.values()}

    @property
    def results(self) -> dict[int, StageResult]:
        """What each one's stage did."""
        return {number: judge.result for number, judge in self.found.items()}

    def records(self) -> list[dict[str, Any]]:
        """The journals of all."""
        return [record for judge in self.found.values() for record in judge.records()]

    def write(self, run: Path, *, final: Path) -> None:
        """The folders of all in the run's, which will be at `final`."""
        for judge in self.found.values():
            judge.write(run, final=final)

    def facts(self) -> dict[str, dict[str, Any]]:
        """What came of each, for the run's summary."""
        return {
            judge.name: judge_facts(judge.stage, judge.summary) for judge in self.found.values()
        }


def train_judges(recipe: Recipe, train: Train, *, folder: Path, progress: Progress) -> Judges:
    """Train every judge of the recipe in the folder of its unfinished run, or read it there where
    that is done.
    """
    found = {}
    for name, number in judges_of(recipe).items():
        progress.say(f"stage {number} trains {name}, an adapter of its own on the same base")
        place = judges_in(folder / CHECKPOINTS) / name
        summary = train(judge_recipe(recipe, number, out=folder / ADAPTERS / name), place)
        progress.say(f"{name}: {results_line(summary)}")
        found[number] = Judge(name, number, place, summary)
        gc.collect()  # PEFT's modules refer to each other; the base is not needed twice in memory
    return Judges(found)
