"""metrics.jsonl: a line per logged step and per validation; and the same as curves where
TensorBoard is installed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.core.progress import Progress
from edgetune.metrics.statistics import headline
from edgetune.training.checkpoint import Position
from edgetune.training.learner import Learned

LOGGED_STEPS = 200  # about this many lines of a stage go to the journal


class Journal:
    """Appends records to a file and keeps them for the report.

    `path` is in the folder of the run in progress; None writes nowhere (all processes but the
    leader). A resumed run begins with the records of its checkpoint. `curves` names the folder of
    TensorBoard's files.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        records: Sequence[dict[str, Any]] = (),
        curves: Path | None = None,
    ) -> None:
        self.path = path
        self.records = list(records)
        self.curves: Curves | None = None if curves is None else open_curves(curves)
        if path is not None:
            path.write_text(
                "".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8"
            )
        if self.curves is not None:
            for record in self.records:
                self.curves.add(record)

    def write(self, **record: Any) -> None:
        """Add one record; floats are rounded to 7 significant digits."""
        rounded = {
            key: float(f"{value:.7g}") if isinstance(value, float) else value
            for key, value in record.items()
        }
        self.records.append(rounded)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rounded) + "\n")
        if self.curves is not None:
            self.curves.add(rounded)

    def validation(self, stage: int, step: int | None) -> dict[str, float]:
        """The metrics of a stage's validation after a step; none where there was none."""
        place = {"kind": "validation", "stage": stage, "step": step}
        records = [r for r in self.records if {k: r[k] for k in place} == place]
        return {k: v for r in records for k, v in r.items() if k not in place}

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


@dataclass(frozen=True)
class StageLog:
    """What a stage says while it runs: lines of the journal, and the progress that is shown."""

    journal: Journal
    progress: Progress
    index: int  # of the stage

    def step(
        self,
        at: Position,
        total: int,
        learned: Learned,
        replayed: Learned | None,
        facts: Mapping[str, float],
        rates: Mapping[str, float],
    ) -> None:
        """Show the step `at` has come to; about LOGGED_STEPS of them write a line: `rates` as they
        are now, `facts` as means over the steps since the last.
        """
        speed = at.tokens / at.seconds
        self.progress.step(
            at.step,
            total,
            loss=learned.loss,
            tokens_per_second=speed,
            seconds=at.seconds,
            reward=facts.get("reward"),
            stage=self.index,
        )
        if at.step % max(1, total // LOGGED_STEPS) and at.step < total:
            return
        means = at.means_of_recent()
        self.journal.write(
            kind="train",
            stage=self.index,
            step=at.step,
            epoch=rates["epoch"],
            loss=at.final_loss,
            learning_rate=rates["learning_rate"],
            grad_norm=rates["grad_norm"],
            tokens=at.tokens,
            tokens_per_second=speed,
            seconds=at.seconds,
            **means,
            **({} if replayed is None else {"replay_loss": replayed.loss}),
        )

    def validation(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Write and show what a validation measured."""
        self.journal.write(kind="validation", stage=self.index, step=step, **metrics)
        self.progress.say(
            f"stage {self.index}  step {step}/{total}  validation  "
            + "  ".join(f"{k} {v:.4f}" for k, v in headline(metrics).items())
        )

    def kept(self, lines: Sequence[str]) -> None:
        """Say which weights the stage leaves."""
        for line in lines:
            self.progress.say(f"stage {self.index}  {line}")


NOT_A_CURVE = ("kind", "stage", "step")


class Curves:
    """Writes every number of a record as a point; a stage's steps are its own, so its curves are
    called `stage0/…`.
    """

    def __init__(self, folder: Path, writer: Any) -> None:
        self.folder, self.writer = folder, writer

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record of the journal: `{"kind", "stage", "step"}` and numbers."""
        for name, value in record.items():
            if name not in NOT_A_CURVE and isinstance(value, (int, float)):
                self.writer.add_scalar(
                    f"stage{record['stage']}/{record['kind']}/{name}", value, record["step"]
                )
        self.writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


def open_curves(folder: Path) -> Curves | None:
    """Curves in an empty `folder`; None where TensorBoard is not installed, or too old for
    torch.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined,unused-ignore]
    except ImportError:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    return Curves(folder, SummaryWriter(str(folder)))  # type: ignore[no-untyped-call,unused-ignore]
