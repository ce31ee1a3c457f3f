"""`edgetune eval` on runs: labels, completions, several references, refusals; the runtime's answers
through a stand-in seam.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from runtime_helpers import decoder_bundle, peft_adapter, write_metadata
from training_helpers import (
    action_rows,
    intent_recipe,
    intent_rows,
    sft_recipe,
    silent,
    with_an_end_token_it_can_say,
    write_rows,
)

from edgetune.cli.eval import command
from edgetune.core.errors import DataError, InputError
from edgetune.data.prompts import PromptFormat
from edgetune.evaluation.answers import Answers, BundleAnswers
from edgetune.evaluation.evaluate import evaluate, measure
from edgetune.evaluation.torch_answers import TorchAnswers
from edgetune.runtime import Runtime
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.training import run_recipe


@pytest.fixture(scope="module")
def intent_run(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intents")
    run_recipe(
        intent_recipe(tiny_encoder, folder, epochs=10), out=folder / "run", progress=silent()
    )
    return folder / "run"


@pytest.fixture(scope="module")
def action_run(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("actions")
    base = with_an_end_token_it_can_say(tiny_decoder, folder / "base")
    run_recipe(sft_recipe(base, folder, epochs=20), out=folder / "run", progress=silent())
    return folder / "run"


class Parrot(Answers):
    """Answers every prompt with itself."""

    task, labels = "text-generation", None
    prompt_format = PromptFormat(template="plain", prompt="{{ q }}", completion="{{ a }}")

    def classify(self, texts: Sequence[str]) -> list[str]:
        raise AssertionError("it has no labels")

    def generate(self, prompts: Sequence[object]) -> list[str]:
        return [str(prompt) for prompt in prompts]


def test_a_classifier_gets_accuracy_and_macro_f1(intent_run: Path, tmp_path: Path) -> None:
    result = evaluate(intent_run, write_rows(tmp_path / "rows.jsonl", intent_rows()))
    assert result.metrics.pop("expected_calibration_error") < 0.01
    assert result.metrics == {"accuracy": 1.0, "macro_f1": 1.0}
    assert result.rows == 12
    first = result.predictions[0]
    assert first.pop("score") > 0.99
    assert first == {"line": 1, "prediction": "lights", "label": "lights"}


def test_a_file_that_was_learned_is_told(intent_run: Path, tmp_path: Path) -> None:
    others = write_rows(tmp_path / "rows.jsonl", intent_rows()[:6])
    assert evaluate(intent_run, others).notes == ()
    (note,) = evaluate(intent_run, intent_run.parent / "intents.jsonl").notes
    assert note.startswith("12 rows of this file were learned: what is measured on them says")


def test_a_generator_that_learnt_its_rows_gets_exact_json(action_run: Path, tmp_path: Path) -> None:
    result = evaluate(action_run, write_rows(tmp_path / "rows.jsonl", action_rows()))
    assert result.metrics["json_exact_match"] == 1.0
    assert result.metrics["exact_match"] == 1.0


def test_batched_answers_are_those_of_single_prompts(action_run: Path) -> None:
    answers = TorchAnswers.open(action_run)
    prompts = [row["prompt"] for row in action_rows()[:5]]
    assert answers.generate(prompts) == [answers.generate([prompt])[0] for prompt in prompts]


def test_rows_with_one_prompt_are_one_question_with_several_references(tmp_path: Path) -> None:
    rows = [{"q": "red", "a": "blue"}, {"q": "red", "a": "red"}, {"q": "one", "a": "two"}]
    result = measure(Parrot(), Path("parrot"), write_rows(tmp_path / "rows.jsonl", rows))
    assert result.rows == 2
    assert result.metrics["exact_match"] == 0.5
    assert result.predictions[0] == {"line": 1, "prediction": "red", "references": ["blue", "red"]}


def test_json_answers_match_whatever_the_order_of_keys(tmp_path: Path) -> None:
    rows = [{"q": '{"b":1,"a":2}', "a": '{"a": 2, "b": 1}'}]
    result = measure(Parrot(), Path("parrot"), write_rows(tmp_path / "rows.jsonl", rows))
    assert result.metrics == {
        "exact_match": 0.0,
        "json_exact_match": 1.0,
        "json_valid": 1.0,
        "slot_f1": 1.0,
    }


def test_text_answers_get_bleu(tmp_path: Path) -> None:
    rows = [{"q": "the cat sat on the mat", "a": "the cat sat on the mat"}]
    result = measure(Parrot(), Path("parrot"), write_rows(tmp_path / "rows.jsonl", rows))
    assert result.metrics["bleu"] == pytest.approx(100.0)
    assert result.metrics["rouge_l"] == 1.0


def test_an_unknown_label_is_refused_with_its_line(intent_run: Path, tmp_path: Path) -> None:
    rows = [*intent_rows()[:1], {"text": "hello", "label": "greeting"}]
    with pytest.raises(DataError, match=r'line 2: the adapter does not know the label "greeting"'):
        evaluate(intent_run, write_rows(tmp_path / "rows.jsonl", rows))


def test_a_missing_column_is_refused_or_skipped(action_run: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*action_rows()[:1], {"question": "hello"}])
    with pytest.raises(DataError, match="line 2"):
        evaluate(action_run, rows)
    assert evaluate(action_run, rows, skip_invalid=True).skipped == 1


def test_the_command_names_its_own_option_for_rows_that_cannot_be_used(
    intent_run: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*intent_rows()[:1], {"text": "hi", "label": ""}])
    result = CliRunner().invoke(command, [str(intent_run), "--data", str(rows)])
    assert "leave such rows out with --skip-invalid." in str(result.exception)


def test_a_run_has_no_adapters_to_choose_from(intent_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--adapter"):
        evaluate(intent_run, write_rows(tmp_path / "rows.jsonl", intent_rows()), adapter="other")


def test_the_command_prints_metrics_and_writes_json(intent_run: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", intent_rows())
    result = CliRunner().invoke(
        command, [str(intent_run), "--data", str(rows), "--json", str(tmp_path / "out.json")]
    )
    assert result.exit_code == 0, result.output
    assert "accuracy" in result.output and "1.0000" in result.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["metrics"]["accuracy"] == 1.0 and len(written["predictions"]) == 12


def test_each_side_says_whether_the_adapters_own_form_shaped_its_answers(
    action_run: Path, tiny_decoder: Path, tmp_path: Path
) -> None:
    own = {
        "max_new_tokens": 4,
        "regex": "[ab]+",
        "repetition_penalty": 1.0,
        "presence_penalty": 0.5,
    }
    run = TorchAnswers.open(action_run)
    assert run.notes == ()
    (freely,) = TorchAnswers(run.model, run.tokenizer, {**run.metadata, "generation": own}).notes
    assert (
        freely
        == "torch answers freely: the adapter's own regex, presence_penalty shapes answers in a"
        " bundle only"
    )
    peft_adapter(tiny_decoder, tmp_path / "held")
    bundle = decoder_bundle(tiny_decoder)
    write_metadata(
        tmp_path / "held",
        base={"name": "tiny", "digest": read_manifest(bundle).base.digest},
        generation=own,
    )
    with Runtime.open(bundle, threads=1) as runtime:
        runtime.load_adapter("held", tmp_path / "held")
        held = BundleAnswers(runtime, "held")
        assert set(held.generate(["hello"])[0]) <= {"a", "b"}
    assert held.notes == (
        (
            "every answer is shaped by the adapter's own regex, presence_penalty, which a run in"
            " torch is not"
        ),
    )


def test_a_run_takes_no_execution_providers(action_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--provider chooses what runs a bundle"):
        evaluate(action_run, tmp_path / "none.jsonl", providers=["cpu"])
