"""`edgetune eval` on bare bases: prompts, examples, labels, plain text; and on what learned from
text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from training_helpers import INTENTS, action_rows, intent_rows, recipe, silent, write_rows

from edgetune.cli.eval import command
from edgetune.core.errors import DataError, InputError
from edgetune.evaluation.answers import Prompting
from edgetune.evaluation.base_answers import BaseAnswers
from edgetune.evaluation.evaluate import evaluate
from edgetune.evaluation.forgetting.subjects import is_base
from edgetune.models.base import open_folder
from edgetune.models.load import load_body, load_tokenizer
from edgetune.training import run_recipe

ASKED = {"prompt": "{{ text }}", "completion": "{{ label }}"}


@pytest.fixture
def intents(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "intents.jsonl", intent_rows())


def answers(base: Path, data: Path, **how: Any) -> BaseAnswers:
    return BaseAnswers(str(base), data, Prompting(**{**ASKED, **how}))


def test_a_base_generates_its_answers_and_gets_metrics(tiny_decoder: Path, tmp_path: Path) -> None:
    result = evaluate(tiny_decoder, write_rows(tmp_path / "rows.jsonl", action_rows()))
    assert result.rows == 12 and set(result.metrics) == {
        "exact_match",
        "json_exact_match",
        "json_valid",
        "slot_f1",
    }


def test_the_label_chosen_is_the_likeliest_after_the_prompt(
    tiny_decoder: Path, intents: Path
) -> None:
    asked = answers(tiny_decoder, intents, choose=True)
    assert asked.labels == tuple(sorted(INTENTS))
    model, tokenizer = (
        load_body(open_folder(tiny_decoder, name="t")),
        load_tokenizer(open_folder(tiny_decoder, name="t")),
    )
    for row in intent_rows()[:4]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["text"]}], tokenize=False, add_generation_prompt=True
        )
        context, logprobs = tokenizer(text, add_special_tokens=False)["input_ids"], []
        for label in asked.labels:
            choice = [
                *tokenizer(label, add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            ]
            logits = model(input_ids=torch.tensor([context + choice])).logits[
                0, len(context) - 1 : -1
            ]
            logprobs.append(
                logits.log_softmax(-1).gather(1, torch.tensor(choice)[:, None]).sum().item()
            )
        (found,) = asked.scored([row["text"]])
        assert found.label == asked.labels[logprobs.index(max(logprobs))]


def test_choosing_gets_the_metrics_of_a_classifier(tiny_decoder: Path, intents: Path) -> None:
    result = evaluate(tiny_decoder, intents, how=Prompting(**ASKED, choose=True))
    assert (
        set(result.metrics) == {"accuracy", "macro_f1"}
        and result.predictions[0]["prediction"] in INTENTS
    )


def test_examples_stand_before_the_question(
    tiny_decoder: Path, intents: Path, tmp_path: Path
) -> None:
    train = write_rows(
        tmp_path / "train.jsonl", [{"text": f"shown {n}", "label": "heat"} for n in range(5)]
    )
    chat = answers(tiny_decoder, intents, shots=2, train=train)._text("and now?")
    assert chat.count("shown") == 2 and chat.count("<|im_start|>assistant\nheat<|im_end|>") == 2
    assert chat.endswith("<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n")
    plain = answers(tiny_decoder, intents, shots=1, train=train, plain=True)._text("and now? ")
    assert plain.startswith("shown ") and plain.endswith(" heat\n\nand now?")


def test_the_same_seed_shows_the_same_examples(
    tiny_decoder: Path, intents: Path, tmp_path: Path
) -> None:
    train = write_rows(
        tmp_path / "train.jsonl", [{"text": f"shown {n}", "label": "heat"} for n in range(50)]
    )
    texts = [
        answers(tiny_decoder, intents, shots=3, train=train, seed=seed)._text("?")
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_texts_get_perplexity_and_bits_per_byte(tiny_decoder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "text.jsonl", [{"text": row["text"]} for row in intent_rows()])
    result = evaluate(tiny_decoder, data)
    assert set(result.metrics) == {"perplexity", "bits_per_byte"} and result.rows == 12
    train = recipe(tiny_decoder, "causal-lm", data, None, epochs=8, max_length=64)
    run_recipe(train, out=tmp_path / "run", progress=silent())
    trained = evaluate(tmp_path / "run", data)
    assert trained.metrics["bits_per_byte"] < 0.7 * result.metrics["bits_per_byte"]


def test_a_text_adapter_is_measured_in_its_bundle_too(tiny_decoder: Path, tmp_path: Path) -> None:
    from export_helpers import export

    data = write_rows(tmp_path / "text.jsonl", [{"text": row["text"]} for row in intent_rows()])
    run_recipe(
        recipe(tiny_decoder, "causal-lm", data, None, epochs=2, max_length=64),
        out=tmp_path / "run",
        progress=silent(),
    )
    export(tmp_path / "bundle", tmp_path / "run")
    in_torch, shipped = evaluate(tmp_path / "run", data), evaluate(tmp_path / "bundle", data)
    assert shipped.metrics == pytest.approx(in_torch.metrics, rel=1e-3)


def test_what_a_base_is(tiny_decoder: Path, tmp_path: Path) -> None:
    assert (
        is_base(tiny_decoder)
        and is_base(Path("builtin:smollm2-135m-instruct"))
        and is_base(Path("models/some.gguf"))
    )
    assert not is_base(tmp_path) and not is_base(tmp_path / "missing")


def test_an_encoder_without_a_head_is_refused_in_one_line(
    tiny_encoder: Path, intents: Path
) -> None:
    with pytest.raises(InputError, match="an encoder without a head cannot answer"):
        evaluate(tiny_encoder, intents, how=Prompting(**ASKED, choose=True))
    result = CliRunner().invoke(command, [str(tiny_encoder), "--data", str(intents)])
    assert isinstance(result.exception, InputError)


def test_more_examples_than_there_are_and_a_row_that_says_nothing_are_refused(
    tiny_decoder: Path, intents: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no 3 examples to show"):
        answers(tiny_decoder, intents, shots=3)
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "?", "answer": "!"}])
    with pytest.raises(
        DataError, match=r"Say how a row is asked and answered with --prompt and --completion"
    ):
        evaluate(tiny_decoder, rows)


def test_a_run_is_asked_as_it_was_trained(
    tiny_decoder: Path, intents: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="ask a bare base"):
        evaluate(tmp_path, intents, how=Prompting(shots=1))


def test_the_command_takes_every_option(tiny_decoder: Path, intents: Path, tmp_path: Path) -> None:
    arguments = [
        str(tiny_decoder),
        "--data",
        str(intents),
        "--prompt",
        "{{ text }}",
        "--completion",
        "label",
        "--choose",
    ]
    arguments += [
        "--shots",
        "1",
        "--train",
        str(intents),
        "--plain",
        "--json",
        str(tmp_path / "out.json"),
    ]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    asked = answers(tiny_decoder, intents, choose=True, shots=1, train=intents, plain=True)
    found = [one.label for one in asked.scored([row["text"] for row in intent_rows()])]
    right = [label == row["label"] for label, row in zip(found, intent_rows(), strict=True)]
    written = json.loads((tmp_path / "out.json").read_text())["metrics"]
    assert written["accuracy"] == pytest.approx(sum(right) / len(right))
