"""`[confidence]`: fitted after training, kept with the adapter, alike in torch and in a bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from confidence_helpers import MORE, intents, rows, told, trained
from head_helpers import room_recipe, room_rows
from training_helpers import INTENTS, recipe, silent, write_rows

from edgetune.cli import cli
from edgetune.core.confidence import Confidence
from edgetune.core.errors import AdapterError, DataError, RecipeError
from edgetune.data.rows import read_rows
from edgetune.evaluation.evaluate import evaluate
from edgetune.evaluation.measures import measure_rows
from edgetune.evaluation.torch_answers import TorchAnswers
from edgetune.models.torch_device import CPU_DEVICE
from edgetune.recipe.checks import check_confidence
from edgetune.recipe.confidence import ConfidenceSettings
from edgetune.report.answers import confidence_section, errors_section
from edgetune.runtime import Runtime
from edgetune.runtime.tasks.prediction_file import answer_rows, requests_of
from edgetune.training import run_recipe
from edgetune.training.confidence import measure_labels
from edgetune.training.held_out import analyse
from edgetune.training.inputs import read_inputs
from edgetune.training.parallel.distributed import Group
from edgetune.training.resolve import resolve
from edgetune.training.stage_model import RunModel
from edgetune.training.stages import held_out_batches


def test_temperature_and_threshold_are_part_of_the_adapter(tiny_encoder: Path) -> None:
    confidence = told(trained(tiny_encoder) / "run")
    assert confidence["rows"] == 30 and confidence["answered"] == 0.8
    assert 0.05 <= confidence["temperature"] <= 20 and 0 < confidence["threshold"] < 1
    assert confidence["fitted_on"] == "torch"


def test_run_and_bundle_give_the_same_scores_and_reject_the_same(tiny_encoder: Path) -> None:
    folder = trained(tiny_encoder)
    in_torch, in_bundle = (
        evaluate(folder / name, folder / "dev.jsonl") for name in ("run", "bundle")
    )
    for ours, theirs in zip(in_torch.predictions, in_bundle.predictions, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
        assert ours.get("rejected") == theirs.get("rejected")
    assert in_torch.metrics["answered"] == pytest.approx(0.8)
    assert in_torch.metrics["expected_calibration_error"] == pytest.approx(
        in_bundle.metrics["expected_calibration_error"], abs=1e-3
    )


def test_a_low_score_has_no_label_and_says_what_was_rejected(tiny_encoder: Path) -> None:
    folder = trained(tiny_encoder)
    texts = [row["text"] for row in rows(MORE)]
    with Runtime.open(folder / "bundle") as runtime:
        least = runtime.adapter("run").confidence.threshold or 0.0
        own = runtime.classify(texts, "run")
        every = runtime.classify(texts, "run", threshold=0)
        none = runtime.classify(texts, "run", threshold=1)
        runtime.load_adapter("hot", folder / "run" / "adapter")
        assert runtime.classify(texts, "hot") == own
        requests = requests_of(
            runtime, [(1, {"text": texts[0]})], path="rows", adapter="run", truncate=True
        )
        ((_, answered),) = answer_rows(runtime, requests, threshold=1)
    assert [one.label is None for one in own] == [one.score < least for one in every]
    assert all(one.label == one.likeliest and one.rejected is None for one in every)
    assert all(one.label is None and one.rejected == one.likeliest for one in none)
    assert answered["label"] is None and answered["rejected"] == every[0].label
    assert answered["score"] == round(every[0].score, 6)


def test_the_scores_are_the_logits_over_the_temperature(tiny_encoder: Path) -> None:
    folder = trained(tiny_encoder)
    temperature = told(folder / "run")["temperature"]
    with Runtime.open(folder / "bundle") as runtime:
        (found,) = runtime.classify(["play a song in the attic"], "run")
        logits, _ = runtime.encoder.run(  # type: ignore[union-attr]
            [runtime.text_ids("play a song in the attic", "run")],
            [runtime.bound("run")],
            pad_token_id=0,
        )
    p = np.exp(logits[0] / temperature)
    assert list(found.scores.values()) == pytest.approx((p / p.sum()).tolist(), abs=1e-6)


def test_without_the_table_there_is_a_temperature_and_no_threshold(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    summary = run_recipe(intents(tiny_encoder, tmp_path), out=tmp_path / "run", progress=silent())
    confidence = told(tmp_path / "run")
    assert confidence["threshold"] is None and confidence["temperature"] != 1.0
    assert summary.confidence is not None
    found = evaluate(tmp_path / "run", tmp_path / "dev.jsonl").metrics
    assert found["expected_calibration_error"] == pytest.approx(
        summary.confidence["expected_calibration_error"], abs=1e-3
    )


def test_a_target_that_nothing_reaches_is_said_and_keeps_no_threshold(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    asked = intents(tiny_encoder, tmp_path, target=0.99)
    summary = run_recipe(asked, out=tmp_path / "run", progress=silent())
    assert told(tmp_path / "run")["threshold"] is None
    (line,) = [line for line in summary.warnings if "[confidence]" in line]
    assert "no threshold gives 99% right answers" in line and "230 right answers" in line


def test_too_few_validation_rows_are_said_where_a_threshold_was_asked_for(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    asked = intents(tiny_encoder, tmp_path, target=0.9)
    write_rows(tmp_path / "dev.jsonl", rows(MORE)[:12])
    summary = run_recipe(asked, out=tmp_path / "run", progress=silent())
    assert told(tmp_path / "run") is None and summary.confidence is None
    assert any("12 validation rows are too few" in line for line in summary.warnings)


def test_a_tagger_is_calibrated_by_its_words(tiny_encoder: Path, tmp_path: Path) -> None:
    asked = room_recipe(tiny_encoder, tmp_path)
    write_rows(tmp_path / "rooms-dev.jsonl", room_rows())
    summary = run_recipe(asked, out=tmp_path / "run", progress=silent())
    assert told(tmp_path / "run")["rows"] == sum(len(row["tokens"]) for row in room_rows())
    found = evaluate(tmp_path / "run", tmp_path / "rooms-dev.jsonl")
    assert summary.analysis is not None and summary.confidence is not None
    assert found.analysis["classes"] == summary.analysis["classes"]
    assert found.analysis["wrong"] == summary.analysis["wrong"] == len(found.errors)
    assert found.metrics["expected_calibration_error"] == pytest.approx(
        summary.confidence["expected_calibration_error"], abs=1e-3
    )


def test_errors_of_held_out_rows_are_those_of_tags_chosen_together(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    inputs = read_inputs(room_recipe(tiny_encoder, tmp_path))
    (stage,) = resolve(inputs, device=CPU_DEVICE, group=Group()).stages
    batches = held_out_batches(stage)
    words = [int((batch.labels != -100).sum()) for batch in batches]
    logits = [np.tile(np.array([0.0, 2.0, 1.0], np.float32), (count, 1)) for count in words]
    found = analyse(stage, batches, logits, Confidence())
    assert len(found["worst"]) == 4
    for one in found["worst"]:
        first, *others = one["got"].split()
        assert first == "B-room" and set(others) == {"I-room"}
        assert one["score"] == pytest.approx(1 / (1 + np.exp(2) + np.exp(1)))


def test_a_taggers_calibration_error_is_that_of_tags_chosen_together(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    run = resolve(
        read_inputs(room_recipe(tiny_encoder, tmp_path)), device=CPU_DEVICE, group=Group()
    )
    (stage,), model = run.stages, RunModel(run).model
    for name, weight in model.named_parameters():
        if "classifier" in name:  # each word by itself is I-room
            weight.data = torch.tensor([0.0, 2.0, 1.0]) if weight.ndim == 1 else 0 * weight
    found = measure_labels(model, stage, held_out_batches(stage))
    best, scores = found.answers(1.0)
    lengths = [len(row.tags) for row in stage.examples.validation]
    assert sorted(set(best.tolist())) == [0, 1] and (best == 0).sum() == len(lengths)
    odds = np.exp([0.0, 2.0]) / np.exp([0.0, 2.0, 1.0]).sum()
    assert scores == pytest.approx(odds[best])


def test_rows_that_are_none_of_the_labels_teach_nothing_and_raise_the_threshold(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    asked = intents(tiny_encoder, tmp_path, target=0.6, out_of_scope="other")
    for name in ("train", "dev"):
        path = tmp_path / f"{name}.jsonl"
        known = [json.loads(line) for line in path.read_text().splitlines()]
        none: list[str | None] = ["other", "other"] if name == "train" else ["other", None, ""] * 4
        strangers = [{"text": f"who wrote book {at}", "label": one} for at, one in enumerate(none)]
        write_rows(path, [*known, *strangers])
    summary = run_recipe(asked, out=tmp_path / "run", progress=silent())
    metadata = json.loads((tmp_path / "run" / "adapter" / "edgetune_adapter.json").read_text())
    assert metadata["labels"] == sorted(INTENTS)
    assert summary.confidence is not None and summary.confidence["out_of_scope_rows"] == 12
    assert (
        metadata["confidence"]["rows"] == 30 and metadata["confidence"]["out_of_scope"] == "other"
    )
    found = evaluate(tmp_path / "run", tmp_path / "dev.jsonl")
    rejected = [one.get("rejected", False) for one in found.predictions if not one["label"]]
    assert len(rejected) == 12 and len(found.predictions) == 42
    assert found.metrics["out_of_scope_recall"] == sum(rejected) / 12
    assert found.metrics["out_of_scope_recall"] == summary.confidence["out_of_scope_recall"]
    assert {error["line"] for error in found.errors if not error["wanted"]} == {
        one["line"] for one in found.predictions if not one["label"] and not one.get("rejected")
    }


def test_the_proof_counts_changed_rejections_and_the_page_draws_the_scores(
    tiny_encoder: Path,
) -> None:
    folder = trained(tiny_encoder)
    manifest = json.loads((folder / "bundle" / "edgetune.json").read_text())
    task = manifest["proof"]["task"]["run"]
    assert task["rejections"] == {"torch": 6, "bundle": 6, "changed": 0}
    assert task["bundle"]["expected_calibration_error"] == pytest.approx(
        task["torch"]["expected_calibration_error"], abs=1e-3
    )
    summary = json.loads((folder / "run" / "summary.json").read_text())
    page = "".join([*confidence_section(summary), *errors_section(summary)])
    assert (page.count("<svg") == 2 and "no label (rejected" in page) or "wrong rows" in page
    assert all(f"<td>{one['label']}</td>" in page for one in summary["analysis"]["classes"])


def test_predict_says_what_it_rejected(tiny_encoder: Path) -> None:
    bundle = str(trained(tiny_encoder) / "bundle")
    call = ["predict", bundle, "play a song in the attic", "--adapter", "run", "--threshold"]
    every, none = (CliRunner().invoke(cli, [*call, least]) for least in ("0", "1"))
    label, score = every.output.split()
    assert none.output.split("\t") == ["(no label)", score, f"rejected: {label}\n"]
    refused = CliRunner().invoke(cli, [*call, "2"])
    assert refused.exit_code == 2 and "0<=x<=1" in refused.output


def test_eval_says_and_writes_what_is_wrong(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = trained(tiny_encoder)
    data, errors = str(folder / "dev.jsonl"), tmp_path / "wrong.jsonl"
    arguments = ["eval", str(folder / "run"), "--data", data, "--errors", str(errors)]
    said = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert said.exit_code == 0, said.output
    wrong = [json.loads(line) for line in errors.read_text().splitlines()]
    scores = [one["score"] for one in wrong]
    assert scores == sorted(scores, reverse=True) and len(wrong) >= 5
    assert all({"line", "text", "wanted", "got", "score"} <= set(one) for one in wrong)
    for words in ("right of the surest", "weakest labels", "most often confused", "the worst:"):
        assert words in said.output


def test_a_file_of_rows_that_are_none_of_the_labels_is_measured(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    folder = trained(tiny_encoder)
    data = write_rows(tmp_path / "none.jsonl", [{**row, "label": ""} for row in rows(MORE)])
    for name in ("run", "bundle"):
        found = evaluate(folder / name, data)
        rejected = [one.get("rejected", False) for one in found.predictions]
        assert found.metrics == {"out_of_scope_recall": sum(rejected) / 30}
        assert len(found.errors) == 30 - sum(rejected) > 0


def test_eval_says_that_no_row_reaches_the_threshold(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = trained(tiny_encoder)
    answers = TorchAnswers.open(folder / "run")
    answers.confidence = replace(answers.confidence, threshold=0.999999)
    found = measure_rows(answers, tmp_path, read_rows(folder / "dev.jsonl"))
    assert found.metrics["answered"] == 0.0
    assert found.notes == (
        "no row reaches the adapter's threshold of 0.999999, so none is answered",
    )


def test_a_row_without_a_label_that_nothing_rejects_is_named(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    answers = TorchAnswers.open(trained(tiny_encoder) / "run")
    answers.confidence = Confidence(out_of_scope="other")
    data = write_rows(tmp_path / "none.jsonl", [{"text": "who wrote it", "label": "other"}])
    with pytest.raises(DataError, match="no row has a label, and no threshold rejects any"):
        measure_rows(answers, tmp_path, read_rows(data))


def test_what_is_not_finite_is_no_answer_in_torch_either(tiny_encoder: Path) -> None:
    answers = TorchAnswers.open(trained(tiny_encoder) / "run")
    for weight in answers.model.parameters():
        weight.data.fill_(float("inf"))
    with pytest.raises(AdapterError, match="is not finite, so there is no answer"):
        answers.scored(["play a song"])


@pytest.mark.parametrize(
    ("method", "problem", "settings", "said"),
    [
        ("causal-lm", "single-label", {}, "no meaning for causal-lm"),
        ("sequence-classification", "regression", {}, "no meaning for problem = 'regression'"),
        ("sequence-classification", "multi-label", {"target": 0.9}, "confidence.target"),
        ("token-classification", "single-label", {"answered": 0.9}, "confidence.answered"),
        ("sequence-classification", "single-label", {"target": 0.9}, "there are none"),
    ],
)
def test_a_table_that_means_nothing_is_refused(
    method: str, problem: Any, settings: dict[str, Any], said: str, tiny_encoder: Path
) -> None:
    made = recipe(tiny_encoder, method, Path("train.jsonl"), None, problem=problem)
    (only,) = made.stage
    made = replace(made, stage=(replace(only, data=replace(only.data, hold_out=0)),))
    with pytest.raises(RecipeError, match=said):
        check_confidence(
            replace(made, confidence=ConfidenceSettings(**settings)), where="recipe.toml"
        )
