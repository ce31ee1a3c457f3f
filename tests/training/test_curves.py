"""TensorBoard's files: the journal's numbers, where the package is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from edgetune.training.journal import Journal

INSTALLED = find_spec("tensorboard") is not None


@pytest.mark.skipif(INSTALLED, reason="tensorboard is installed")
def test_without_tensorboard_there_is_the_journal_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl", curves=tmp_path / "tensorboard")
    journal.write(kind="train", stage=0, step=1, loss=2.0)
    journal.close()
    (tmp_path / "run").mkdir()
    journal.copy_to(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


@pytest.mark.skipif(not INSTALLED, reason="needs the package tensorboard")
def test_tensorboard_gets_the_records_of_before_and_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = [{"kind": "train", "stage": 0, "step": 1, "loss": 2.0}]
    for _ in range(
        2
    ):  # the second begins with an empty folder, not with the first one's points again
        journal = Journal(
            tmp_path / "metrics.jsonl", records=before, curves=tmp_path / "tensorboard"
        )
        journal.write(kind="train", stage=0, step=2, loss=1.0)
        journal.write(kind="validation", stage=0, step=2, accuracy=0.5)
        journal.close()
    (tmp_path / "run").mkdir()
    journal.copy_to(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("stage0/train/loss")] == [(1, 2.0), (2, 1.0)]
    assert [(e.step, e.value) for e in events.Scalars("stage0/validation/accuracy")] == [(2, 0.5)]


def test_a_journal_continues_with_the_records_of_its_checkpoint(tmp_path: Path) -> None:
    path, before = (
        tmp_path / "metrics.jsonl",
        [{"kind": "train", "stage": 0, "step": 1, "loss": 2.0}],
    )
    path.write_text(
        '{"kind": "train", "step": 9}\n'
    )  # written after the checkpoint by a process that was killed
    Journal(path, records=before).write(kind="train", stage=0, step=2, loss=1 / 3)
    assert path.read_text().splitlines() == [
        '{"kind": "train", "stage": 0, "step": 1, "loss": 2.0}',
        '{"kind": "train", "stage": 0, "step": 2, "loss": 0.3333333}',
    ]
