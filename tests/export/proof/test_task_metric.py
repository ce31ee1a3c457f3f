"""The task metric of an export: the recipe's validation rows through torch and through the bundle's
engine.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from export_helpers import make_adapter
from training_helpers import (
    intent_recipe,
    intent_rows,
    recipe,
    sft_recipe,
    silent,
    with_an_end_token_it_can_say,
    write_rows,
)

from edgetune.cli.export import command
from edgetune.cli.verify import command as verify
from edgetune.core.errors import DataError, InputError, ProofError
from edgetune.data.loaders import load_examples
from edgetune.evaluation.evaluate import evaluate
from edgetune.export.bundle import export_bundle
from edgetune.export.inputs.sources import read_source
from edgetune.export.proof.task_metric import FREE, TaskPlan, relative_loss
from edgetune.export.proof.task_rows import rows_of, task_rows
from edgetune.export.proof.torch_model import torch_model
from edgetune.models.load import load_tokenizer
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision
from edgetune.recipe.generation import FORMS, shaping
from edgetune.recipe.read import load_recipe
from edgetune.runtime.bundle.manifest import Manifest, read_manifest
from edgetune.training import run_recipe


@pytest.fixture(scope="module")
def intents(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intents")
    run_recipe(
        intent_recipe(tiny_encoder, folder, epochs=10), out=folder / "run", progress=silent()
    )
    return folder / "run"


@pytest.fixture(scope="module")
def actions(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("actions")
    base = with_an_end_token_it_can_say(tiny_decoder, folder / "base")
    run_recipe(sft_recipe(base, folder, epochs=20), out=folder / "run", progress=silent())
    return folder / "run"


def shipped(run: Path, out: Path, **plan: object) -> Manifest:
    return export_bundle(
        [("task", run)], out, precision=Precision("fp32"), threads=1, task=TaskPlan(**plan)
    )  # type: ignore[arg-type]


def test_an_encoders_metric_is_the_one_eval_gives_for_run_and_bundle(
    intents: Path, tmp_path: Path
) -> None:
    found = shipped(intents, tmp_path / "b").proof["task"]["task"]
    held_out = intents.parent / "intents-dev.jsonl"
    assert (
        found["torch"] == evaluate(intents, held_out).metrics
        and found["bundle"] == evaluate(tmp_path / "b", held_out).metrics
    )
    assert (found["metric"], found["rows"], found["found"], found["same"], found["data"]) == (
        "accuracy",
        4,
        4,
        1.0,
        "intents-dev.jsonl",
    )
    page = (tmp_path / "b" / "report.html").read_text()
    assert (
        "4 of 4 of intents-dev.jsonl" in page
        and "1 of 1" in page
        and read_manifest(tmp_path / "b").files["model.onnx.data"].sha256 in page
    )


def test_the_commands_take_other_rows_and_verify_repeats_it(intents: Path, tmp_path: Path) -> None:
    other, bundle = (
        str(write_rows(tmp_path / "other.jsonl", intent_rows()[4:10])),
        str(tmp_path / "b"),
    )
    arguments = [
        "--adapter",
        f"a={intents}",
        "--out",
        bundle,
        "--mode",
        "merged",
        "--precision",
        "int8",
        "--threads",
        "1",
    ]
    exported = CliRunner().invoke(command, [*arguments, "--task-data", other, "--task-rows", "3"])
    assert exported.exit_code == 0 and "3 of 6 rows of other.jsonl" in exported.output, (
        exported.output
    )
    recorded = json.loads((tmp_path / "b" / "edgetune.json").read_text())["proof"]["task"]["a"]
    done = CliRunner().invoke(
        verify,
        [bundle, "--parity", "--task-data", other, "--task-rows", "3", "--threads", "1"],
        standalone_mode=False,
    )
    assert done.return_value == 0 and "proof a: passed" in done.output
    assert (
        f"accuracy {recorded['torch']['accuracy']:.4f} in torch,"
        f" {recorded['bundle']['accuracy']:.4f} in the bundle (3 of 6" in done.output
    )
    with pytest.raises(InputError, match="Add --parity"):
        CliRunner().invoke(
            verify, [bundle, "--task-data", other], standalone_mode=False, catch_exceptions=False
        )
    with pytest.raises(InputError, match="Add --task-data FILE"):
        CliRunner().invoke(
            verify,
            [bundle, "--parity", "--task-rows", "3"],
            standalone_mode=False,
            catch_exceptions=False,
        )


def test_a_lossy_bundle_is_refused_leaves_the_old_one_and_ships_where_that_is_asked_for(
    actions: Path, tmp_path: Path
) -> None:
    data, bundle = actions.parent / "actions.jsonl", tmp_path / "b"
    old = shipped(actions, bundle, rows=0)
    lossy = ["--adapter", f"a={actions}", "--out", str(bundle), "--replace", "--threads", "1"]
    lossy += ["--precision", "int4", "--block-size", "64", "--keep", "lm_head=int4"]
    lossy += ["--task-data", str(data)]
    with pytest.raises(ProofError, match=r"exact match 100.0 → .*--allow-metric-loss ships it"):
        CliRunner().invoke(command, lossy, standalone_mode=False, catch_exceptions=False)
    assert read_manifest(bundle).files == old.files
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["b"]
    done = CliRunner().invoke(command, [*lossy, "--allow-metric-loss"])
    assert done.exit_code == 0 and "a: changed: same answer on " in done.output
    verdict = read_manifest(bundle).proof["verdict"]["a"]
    assert verdict["allowed_by"] == "--allow-metric-loss" and verdict["reasons"]
    page = (bundle / "report.html").read_text()
    assert '<span class="bad">changed</span>' in page and "✓ as trained" not in page
    again = CliRunner().invoke(verify, [str(bundle), "--parity", "--threads", "1"])
    assert "a: changed: " in again.output and "--allow-metric-loss" in again.output


def test_a_decoders_answers_are_compared_text_by_text(actions: Path, tmp_path: Path) -> None:
    found = shipped(actions, tmp_path / "b", rows=2).proof["task"]["task"]
    assert (found["metric"], found["rows"], found["found"], found["same"]) == (
        "json_exact_match",
        2,
        4,
        1.0,
    )
    assert found["torch"] == found["bundle"]


def test_an_adapters_own_form_and_penalties_do_not_shape_the_comparison(
    actions: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(actions, run)
    metadata = json.loads((run / "adapter" / "edgetune_adapter.json").read_text())
    metadata["generation"] |= {
        "regex": "[xyz]{3}",
        "repetition_penalty": 5.0,
        "logit_bias": {"40": 50.0},
    }
    (run / "adapter" / "edgetune_adapter.json").write_text(json.dumps(metadata))
    found = shipped(run, tmp_path / "b", rows=2).proof["task"]["task"]
    assert found["same"] == 1.0 and found["torch"] == found["bundle"]
    assert len(shaping(metadata["generation"])) == 3 and not set(
        shaping(metadata["generation"])
    ) - set(FREE) - set(FORMS)


def test_nothing_is_measured_of_zero_rows_or_without_a_recipe(
    intents: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    assert rows_of([read_source("a", intents)], limit=0) == {}
    assert (
        rows_of([read_source("a", make_adapter(tiny_encoder, tmp_path / "plain"))], limit=9) == {}
    )


def test_rows_asked_for_in_vain_are_told_of_and_a_file_that_is_not_there_before_anything_else(
    tiny_encoder: Path, intents: Path, tmp_path: Path
) -> None:
    plain, lines = make_adapter(tiny_encoder, tmp_path / "plain"), list[str]()
    (plain / "edgetune_adapter.json").unlink()
    assert (
        rows_of(
            [read_source("a", plain)],
            limit=9,
            data=intents.parent / "intents-dev.jsonl",
            say=lines.append,
        )
        == {}
    )
    assert lines == [
        "task a: not measured: an adapter of another tool does not say how it reads rows"
    ]
    with pytest.raises(DataError, match="no such data file"):
        export_bundle(
            [("task", intents)],
            tmp_path / "b",
            task=TaskPlan(data=tmp_path / "nowhere.jsonl"),
            say=lines.append,
        )
    with pytest.raises(DataError, match="no such data file"):
        CliRunner().invoke(
            verify,
            [str(tmp_path), "--parity", "--task-data", "nowhere.jsonl"],
            standalone_mode=False,
            catch_exceptions=False,
        )
    assert len(lines) == 1


def test_text_is_measured_by_its_perplexity(tiny_decoder: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "text.jsonl", [{"text": row["text"]} for row in intent_rows()])
    run_recipe(
        recipe(tiny_decoder, "causal-lm", train, train, max_steps=3),
        out=tmp_path / "run",
        progress=silent(),
    )
    found = shipped(tmp_path / "run", tmp_path / "b").proof["task"]["task"]
    assert (found["metric"], found["same"]) == ("perplexity", None)
    assert found["torch"]["perplexity"] == pytest.approx(found["bundle"]["perplexity"], rel=1e-5)


def test_rows_that_are_gone_are_a_line_and_those_asked_for_an_error(
    intents: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    moved = tmp_path / "run"
    moved.mkdir()
    (moved / "adapter").symlink_to(intents / "adapter")
    (moved / "recipe.toml").write_text(
        (intents / "recipe.toml").read_text().replace("intents-dev", "gone")
    )
    assert rows_of([read_source("task", moved)], limit=9, say=lines.append) == {}
    assert "not measured" in lines[0] and "gone.jsonl" in lines[0]
    with pytest.raises(DataError, match="no such data file"):
        rows_of([read_source("task", moved)], limit=9, data=tmp_path / "nowhere.jsonl")


def test_a_row_that_cannot_be_answered_is_a_line_and_in_rows_asked_for_an_error(
    intents: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    odd = write_rows(tmp_path / "odd.jsonl", [{"text": "hello", "label": "unheard"}])
    source, base, lines = read_source("task", intents), resolve_base(str(tiny_encoder)), list[str]()

    def measure(plan: TaskPlan) -> object:
        return plan.measure(
            tmp_path, None, base, [source], load=torch_model, threads=1, say=lines.append
        )  # type: ignore[arg-type]

    with pytest.raises(DataError, match='does not know the label "unheard"'):
        measure(TaskPlan(data=odd))
    own = tmp_path / "run"
    own.mkdir()
    (own / "adapter").symlink_to(intents / "adapter")
    (own / "recipe.toml").write_text(
        (intents / "recipe.toml")
        .read_text()
        .replace(str(intents.parent / "intents-dev.jsonl"), str(odd))
    )
    source = read_source("task", own)
    assert measure(TaskPlan()) == {} and "task task: not measured" in lines[0]


def test_what_the_bundle_cannot_answer_is_a_line_too(actions: Path, tmp_path: Path) -> None:
    whole, source, lines = (
        shipped(actions, tmp_path / "b", rows=0),
        read_source("task", actions),
        list[str](),
    )
    short = replace(whole, graph=replace(whole.graph, max_length=4))
    base = resolve_base(str(actions.parent / "base"))

    def measure(plan: TaskPlan) -> object:
        return plan.measure(
            tmp_path / "b", short, base, [source], load=torch_model, threads=1, say=lines.append
        )

    assert (
        measure(TaskPlan(2)) == {}
        and "not measured: the prompt is longer than the context" in lines[0]
    )
    with pytest.raises(InputError, match="longer than the context"):
        measure(TaskPlan(2, actions.parent / "actions-dev.jsonl"))


def test_held_out_rows_are_those_that_training_held_out(tiny_encoder: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "rows.jsonl", intent_rows())
    settings = recipe(tiny_encoder, "sequence-classification", train, None, max_steps=1)
    stage = replace(settings.stage[0], data=replace(settings.stage[0].data, hold_out=3))
    run_recipe(replace(settings, stage=(stage,), seed=5), out=tmp_path / "run", progress=silent())
    rows = task_rows(read_source("a", tmp_path / "run"), limit=10)
    assert rows is not None and rows.found == 3
    base = resolve_base(str(tiny_encoder))
    trained = load_examples(
        load_recipe(tmp_path / "run" / "recipe.toml").stage[0], load_tokenizer(base), base, seed=5
    )
    assert [row.line for row in rows.rows.rows] == [example.row for example in trained.validation]


@pytest.mark.parametrize(
    ("reference", "value", "higher", "loss"),
    [(0.8, 0.6, True, 0.25), (0.8, 1.0, True, -0.25), (10, 11, False, 0.1), (0, 0, True, 0.0)],
)
def test_a_loss_is_relative_to_the_reference(
    reference: float, value: float, higher: bool, loss: float
) -> None:
    assert relative_loss(reference, value, higher_is_better=higher) == pytest.approx(loss)
