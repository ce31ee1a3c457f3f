"""Temperature and threshold fitted again on a rounded bundle's own answers, and what is recorded of
them; the bundle's answers to the validation rows are those that training measured.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confidence_helpers import trained
from conftest import CommandLine
from export_helpers import AS_IT_IS
from head_helpers import room_recipe, room_rows
from training_helpers import action_rows, intent_rows, recipe, silent, write_rows

from edgetune.core.layout import ADAPTER_METADATA
from edgetune.data.rows import read_rows
from edgetune.evaluation.evaluate import evaluate
from edgetune.export.bundle import export_bundle
from edgetune.export.inputs.sources import read_source
from edgetune.export.proof.confidence import fit_again
from edgetune.export.proof.task_metric import TaskPlan
from edgetune.metrics.calibration import best_labels, fit_temperature
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision
from edgetune.recipe.schema import Generation
from edgetune.runtime import Runtime
from edgetune.runtime.bundle.manifest import Manifest, read_manifest
from edgetune.training import run_recipe


@dataclass(frozen=True)
class Shipped:
    """A bundle, and what its export said."""

    folder: Path
    manifest: Manifest
    lines: list[str]

    def found(self, name: str = "run") -> dict[str, Any]:
        found: dict[str, Any] = self.manifest.proof["confidence"][name]
        return found

    def told(self, name: str = "run") -> dict[str, Any]:
        path = self.folder / "adapters" / name / ADAPTER_METADATA
        confidence: dict[str, Any] = json.loads(path.read_text())["confidence"]
        return confidence

    @property
    def said(self) -> str:
        """The line on how sure it is."""
        (line,) = [line for line in self.lines if line.startswith("confidence ")]
        return line


def ship(
    out: Path, *runs: Path, precision: str = "int4", mode: str = "separate", **plan: Any
) -> Shipped:
    lines: list[str] = []
    manifest = export_bundle(
        [(run.name, run) for run in runs],
        out,
        precision=Precision(precision),
        mode=mode,
        threads=1,
        task=replace(AS_IT_IS, **plan),
        say=lines.append,
    )
    return Shipped(out, manifest, lines)


@cache
def rounded(base: Path) -> Shipped:
    """Trained so that four fifths of 30 rows are answered, with the base in 4 bits."""
    run = trained(base) / "run"
    return ship(run.parent / "int4", run)


def logits_and_labels(bundle: Path, data: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = read_rows(data).rows
    with Runtime.open(bundle) as runtime:
        labels = list(runtime.labels("run") or ())
        assert runtime.encoder is not None
        found, _ = runtime.encoder.run(
            [runtime.text_ids(row.values["text"], "run") for row in rows],
            [runtime.bound("run")] * len(rows),
        )
    return np.array(found), np.array([labels.index(row.values["label"]) for row in rows])


def test_the_bundles_own_answers_choose_temperature_and_threshold(tiny_encoder: Path) -> None:
    bundle, run = rounded(tiny_encoder), trained(tiny_encoder) / "run"
    logits, right = logits_and_labels(bundle.folder, run.parent / "dev.jsonl")
    before, after = bundle.found()["trained"], bundle.found()["shipped"]
    assert after["temperature"] == pytest.approx(fit_temperature(logits, right), abs=1e-4)
    assert after["temperature"] != before["temperature"]
    for one in (before, after):
        _, scores = best_labels(logits, one["temperature"])
        assert (scores >= one["threshold"]).mean() == pytest.approx(one["share_answered"])
    assert after["share_answered"] == 0.8 != before["share_answered"]


def test_what_ships_is_what_the_proof_records(tiny_encoder: Path) -> None:
    bundle, run = rounded(tiny_encoder), trained(tiny_encoder) / "run"
    told = bundle.told()
    assert told == {name: bundle.found()["shipped"][name] for name in told}
    assert (told["fitted_on"], told["rows"], told["answered"]) == ("int4", 30, 0.8)
    own = json.loads((run / "adapter" / ADAPTER_METADATA).read_text())["confidence"]
    assert own == {name: bundle.found()["trained"][name] for name in own}
    measured = evaluate(bundle.folder, run.parent / "dev.jsonl").metrics
    assert measured["answered"] == pytest.approx(0.8)
    assert measured["expected_calibration_error"] == pytest.approx(
        bundle.found()["shipped"]["expected_calibration_error"], abs=1e-4
    )
    assert "fitted again on int4 (30 answers): temperature" in bundle.said
    assert f"to {told['threshold']:.3f}" in bundle.said and "to 80.0%" in bundle.said
    page = (bundle.folder / "report.html").read_text()
    assert "<td>shipped: int4</td>" in page and f"<td>{told['threshold']:.3f}</td>" in page


def test_rejections_are_compared_as_trained_and_as_shipped(tiny_encoder: Path) -> None:
    rejections = rounded(tiny_encoder).manifest.proof["task"]["run"]["rejections"]
    assert (rejections["torch"], rejections["bundle"]) == (6, 6)


def test_the_proof_passes_again_from_the_bundle_alone(
    tiny_encoder: Path, command_line: CommandLine
) -> None:
    bundle, run = rounded(tiny_encoder), trained(tiny_encoder) / "run"
    data = run.parent / "dev.jsonl"
    code, out, _ = command_line("verify", bundle.folder, "--parity", "--task-data", data)
    (line,) = [line for line in bundle.lines if line.startswith("task run")]
    assert code == 0 and line in out


def test_a_merged_bundle_is_fitted_again_and_rejects(tiny_encoder: Path, tmp_path: Path) -> None:
    run = trained(tiny_encoder) / "run"
    merged = ship(tmp_path / "merged", run, mode="merged")
    (entry,) = read_manifest(tmp_path / "merged").adapters
    assert entry.confidence == merged.told() and entry.confidence["fitted_on"] == "int4"
    assert evaluate(merged.folder, run.parent / "dev.jsonl").metrics["answered"] == pytest.approx(
        0.8
    )


def test_without_rounding_the_adapter_ships_as_it_is(tiny_encoder: Path) -> None:
    folder = trained(tiny_encoder)
    name = ADAPTER_METADATA
    shipped = folder / "bundle" / "adapters" / "run" / name
    assert shipped.read_bytes() == (folder / "run" / "adapter" / name).read_bytes()
    found = read_manifest(folder / "bundle").proof["confidence"]["run"]
    assert found["kept"] == "no weight is rounded" and found["trained"] == found["shipped"]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("task-rows", "--task-rows 0"),
        ("gone", "dev.jsonl"),
        ("others", "its validation rows are others than those of the training"),
        ("no recipe", "no recipe.toml beside the adapter names its validation rows"),
        ("target", "no threshold gives 99% right answers with 90% certainty"),
    ],
)
def test_what_training_fitted_ships_where_rows_or_a_threshold_are_not_there(
    harm: str, said: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    for name in ("run", "train.jsonl", "dev.jsonl"):
        copy = shutil.copytree if name == "run" else shutil.copy
        copy(trained(tiny_encoder) / name, tmp_path / name)
    moved, run = tmp_path / "dev.jsonl", tmp_path / "run"
    text = (run / "recipe.toml").read_text().replace(str(trained(tiny_encoder)), str(tmp_path))
    target = text.replace("answered = 0.8", "target = 0.99")
    (run / "recipe.toml").write_text(target if harm == "target" else text)
    if harm == "gone":
        moved.unlink()
    elif harm == "others":
        moved.write_text("".join(moved.read_text().splitlines(keepends=True)[1:]))
    elif harm == "no recipe":
        (run / "recipe.toml").unlink()
    bundle, lines = rounded(tiny_encoder), list[str]()
    found = fit_again(
        bundle.folder,
        bundle.manifest,
        resolve_base(str(tiny_encoder)),
        [read_source("run", run)],
        keep=TaskPlan(rows=0).confidence_kept_by if harm == "task-rows" else "",
        threads=1,
        say=lines.append,
    )
    assert lines == [f"confidence run: {found['run'].line()}"]
    assert lines[0].startswith("confidence run: as fitted on torch, not again: ")
    assert said in lines[0]


def test_the_trained_one_ships_where_that_is_asked_for(
    tiny_encoder: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    run, out = trained(tiny_encoder) / "run", tmp_path / "bundle"
    arguments = ("--adapter", f"run={run}", "--out", out, "--precision", "int4", "--threads", 1)
    code, _, said = command_line("export", *arguments, "--keep-confidence", "--allow-metric-loss")
    assert code == 0 and "as fitted on torch, not again: --keep-confidence" in said
    kept = Shipped(out, read_manifest(out), [])
    assert kept.told() == json.loads((run / "adapter" / ADAPTER_METADATA).read_text())["confidence"]


def test_tags_and_several_labels_are_answered_as_training_measured_them(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    tags = room_recipe(tiny_encoder, tmp_path)
    write_rows(tmp_path / "rooms-dev.jsonl", room_rows())
    several = [{**row, "label": [row["label"]] * (at % 2)} for at, row in enumerate(intent_rows())]
    data = write_rows(tmp_path / "several.jsonl", several)
    sets = recipe(tiny_encoder, "sequence-classification", data, data, problem="multi-label")
    for name, made in (("tags", tags), ("sets", sets)):
        run_recipe(made, out=tmp_path / name, progress=silent())
    bundle = ship(tmp_path / "bundle", tmp_path / "tags", tmp_path / "sets", precision="fp16")
    check_rows_of_training(bundle, tmp_path, tags=48, sets=36)


def test_text_and_a_decoders_labels_are_answered_as_training_measured_them(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    train = write_rows(tmp_path / "train.jsonl", action_rows())
    dev = write_rows(tmp_path / "dev.jsonl", action_rows() * 3)
    text = replace(recipe(tiny_decoder, "sft", train, dev), generation=Generation(schema="auto"))
    labelled = write_rows(tmp_path / "labels.jsonl", intent_rows() * 3)
    labels = recipe(tiny_decoder, "sequence-classification", labelled, labelled, epochs=1)
    for name, made in (("text", text), ("labels", labels)):
        run_recipe(made, out=tmp_path / name, progress=silent())
    bundle = ship(tmp_path / "bundle", tmp_path / "text", tmp_path / "labels", precision="fp16")
    check_rows_of_training(bundle, tmp_path, text=36, labels=36)


def check_rows_of_training(bundle: Shipped, runs: Path, **rows: int) -> None:
    """A bundle in half precision rounds almost nothing: the same rows give the same figures."""
    for name, count in rows.items():
        summary = json.loads((runs / name / "summary.json").read_text())["confidence"]
        before, after = bundle.found(name)["trained"], bundle.found(name)["shipped"]
        assert after["rows"] == summary["rows"] == count and after["fitted_on"] == "fp16"
        key = "expected_calibration_error"
        assert before[key] == pytest.approx(summary[key], abs=5e-3)
        for number in {"temperature", "slope", "intercept"} & set(after):
            assert after[number] == pytest.approx(summary[number], rel=0.02, abs=1e-4)
