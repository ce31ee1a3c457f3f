"""`edgetune label` on a bundle of tiny adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from export_helpers import export
from training_helpers import INTENTS, ROOMS, intent_recipe, intent_rows, recipe, silent, write_rows

from edgetune.cli import cli
from edgetune.core.errors import EdgetuneError
from edgetune.training import run_recipe

FEW = intent_rows()[:6]  # two rooms


@pytest.fixture(scope="module")
def teachers(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a classifier and an embedding, and the rows both learned."""
    folder = tmp_path_factory.mktemp("teachers")
    train = write_rows(folder / "few.jsonl", FEW)
    run_recipe(intent_recipe(tiny_encoder, folder), out=folder / "head", progress=silent())
    near = recipe(tiny_encoder, "contrastive", train, None)
    run_recipe(near, out=folder / "near", progress=silent())
    export(folder / "bundle", folder / "head", folder / "near")
    return folder


def label(folder: Path, out: Path, *options: str) -> Result:
    """The command on texts of which one is known, in other letters."""
    texts = [{"text": text.format(room)} for room in ROOMS[2:] for text in INTENTS.values()]
    unlabelled = write_rows(out.parent / "texts.jsonl", [*texts, {"text": FEW[0]["text"].upper()}])
    command = ["label", str(folder / "bundle"), "--data", str(folder / "few.jsonl")]
    return CliRunner().invoke(
        cli, [*command, "--texts", str(unlabelled), "--out", str(out), *options]
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("weight", ["0", "0.3", "1"])
def test_texts_get_labels_and_train_with_the_rows_that_had_them(
    teachers: Path, tmp_path: Path, weight: str
) -> None:
    options = ("--share", "0.5", "--copies", "2", "--heads-weight", weight)
    done = label(teachers, tmp_path / "out.jsonl", *options)
    assert done.exit_code == 0, done.output
    assert "6 rows with labels 2 times, 3 of 6 texts without" in done.output
    rows = rows_of(tmp_path / "out.jsonl")
    assert rows[:12] == FEW * 2 and len(rows) == 15
    assert {row["label"] for row in rows[12:]} <= set(INTENTS)
    assert FEW[0]["text"].upper() not in [row["text"] for row in rows]


def test_rows_that_are_measured_do_not_join(teachers: Path, tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", intent_rows()[6:9])
    done = label(teachers, tmp_path / "out.jsonl", "--measure", str(held), "--share", "1")
    assert done.exit_code == 0, done.output
    for voice in ("classifiers", "neighbours", "all", "surest"):
        assert f"  {voice} " in done.output
    texts = [row["text"] for row in rows_of(tmp_path / "out.jsonl")[18:]]
    assert len(texts) == 3 and not {*texts} & {row["text"] for row in intent_rows()[6:9]}


def test_labels_that_do_not_fit_are_one_line(teachers: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "held.jsonl", [{"text": "a", "label": "weather"}])
    done = label(teachers, tmp_path / "out.jsonl", "--measure", str(other))
    assert isinstance(done.exception, EdgetuneError)
    assert 'line 1: the label "weather"' in str(done.exception).replace(": the", ": the")
    assert not (tmp_path / "out.jsonl").exists()
