"""token-classification: rows, alignment, loss and gradient against transformers, training, and what
is refused.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from head_helpers import room_recipe, room_rows
from peft import PeftModel
from resume_helpers import WEIGHTS, stopped_at
from safetensors.numpy import load_file
from training_helpers import recipe, silent, write_rows
from transformers import BertForTokenClassification

from edgetune.core.errors import DataError, RecipeError
from edgetune.data.collation import collate_tagged
from edgetune.data.loaders import load_examples
from edgetune.evaluation.evaluate import evaluate
from edgetune.evaluation.torch_answers import TorchAnswers
from edgetune.models.base import open_folder
from edgetune.models.heads import TokenClassifier
from edgetune.models.load import load_body, load_tokenizer
from edgetune.objectives.labels import token_classification, word_logits
from edgetune.recipe.read import recipe_from_dict, recipe_to_toml, tomllib
from edgetune.training import run_recipe
from edgetune.training.probes import word_states

TAGS = ("B-room", "I-room", "O")


def tagged(
    base: Path,
    folder: Path,
    rows: list[dict[str, Any]],
    held_out: list[dict[str, Any]] | None = None,
    **stage: Any,
) -> Any:
    """A stage's examples over these rows."""
    dev = write_rows(folder / "dev.jsonl", held_out) if held_out else None
    made = recipe(
        base, "token-classification", write_rows(folder / "train.jsonl", rows), dev, **stage
    )
    opened = open_folder(base, name="tiny")
    return load_examples(made.stage[0], load_tokenizer(opened), opened)


def both(base: Path, folder: Path) -> tuple[TokenClassifier, BertForTokenClassification, Any]:
    """Ours and transformers' with the same weights, and a padded batch."""
    theirs = BertForTokenClassification.from_pretrained(base, num_labels=3).eval()
    ours = TokenClassifier(
        load_body(open_folder(base, name="tiny")), labels=3, pooling="mean"
    ).eval()
    ours.classifier.load_state_dict(theirs.classifier.state_dict())
    return ours, theirs, collate_tagged(tagged(base, folder, room_rows()).train, 0)


def test_loss_and_gradients_are_transformers(tiny_encoder: Path, tmp_path: Path) -> None:
    ours, theirs, batch = both(tiny_encoder, tmp_path)
    loss, count = token_classification(ours, batch)
    expected = theirs(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss
    assert count == batch.targets == int((batch.labels != -100).sum())
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    mine = dict(ours.named_parameters())
    compared = [(name, p.grad, mine[name].grad) for name, p in theirs.named_parameters()]
    assert len(compared) > 30
    for name, wanted, got in compared:
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5, msg=name)


def test_the_loss_on_features_is_the_loss_of_the_whole_model(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    model, _, _ = both(tiny_encoder, tmp_path)
    rows = tagged(tiny_encoder, tmp_path, room_rows()).train
    featured = [
        replace(row, features=states)
        for row, states in zip(rows, word_states(model, rows, pad_id=0), strict=True)
    ]
    ours, expected = (
        word_logits(model, collate_tagged(featured, 0)),
        word_logits(model, collate_tagged(rows, 0)),
    )
    torch.testing.assert_close(ours[0], expected[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(ours[1], expected[1])


def test_a_batch_without_any_word_has_loss_0(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = [*room_rows(), {"tokens": ["\u200b"], "tags": ["O"]}]
    batch = collate_tagged(tagged(tiny_encoder, tmp_path, rows).train[-1:], 0)
    model = TokenClassifier(
        load_body(open_folder(tiny_encoder, name="tiny")), labels=3, pooling="mean"
    )
    loss, count = token_classification(model, batch)
    assert (loss.item(), count, batch.targets) == (0.0, 0, 0)


def test_the_first_sub_word_carries_the_tag(tiny_encoder: Path, tmp_path: Path) -> None:
    example = tagged(
        tiny_encoder, tmp_path, [{"tokens": ["brown", "xyzzy"], "tags": ["O", "B-a"]}]
    ).train[0]
    tokenizer = load_tokenizer(open_folder(tiny_encoder, name="tiny"))
    pieces = tokenizer.convert_ids_to_tokens(example.input_ids)
    assert pieces[2].startswith("x") and pieces[3].startswith("##")
    assert [label for label in example.labels if label != -100] == [1, 0]
    assert example.labels[2] == 0 and set(example.labels[3:]) == {-100}


def test_words_that_the_model_never_sees_are_counted(tiny_encoder: Path, tmp_path: Path) -> None:
    long = {"tokens": ["dog"] * 20, "tags": ["B-a"] * 20}
    rows = [{"tokens": ["the", "\u200b", "dog"], "tags": ["O", "B-a", "O"]}, long]
    found = tagged(tiny_encoder, tmp_path, rows, rows[:1], max_length=12)
    assert found.unseen_words == {
        "train": {"cut": 10, "no_sub_word": 1},
        "validation": {"cut": 0, "no_sub_word": 1},
    }
    assert found.truncated == {"train": 1, "validation": 0}
    assert found.train[0].first == (1, None, 2) and len(found.train[1].input_ids) == 12


def with_marks(base: Path, folder: Path, rows: list[dict[str, Any]]) -> Any:
    """A stage's examples over these rows, capitals marked."""
    data = {"train": str(write_rows(folder / "t.jsonl", rows)), "case_marks": True}
    made = recipe_from_dict(
        {"base": str(base), "stage": [{"method": "token-classification", "data": data}]}
    )
    opened = open_folder(base, name="tiny")
    return load_examples(made.stage[0], load_tokenizer(opened), opened)


def test_marks_stand_before_words_with_capitals_and_have_no_tag(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    small = {"tokens": ["a", "brown", "dog"], "tags": ["O", "B-a", "I-a"]}
    capitals = {**small, "tokens": ["a", "Brown", "DOG"]}
    plain, marked = with_marks(tiny_encoder, tmp_path, [small, capitals]).train
    one, two = load_tokenizer(open_folder(tiny_encoder, name="tiny"))(
        ["^", "^^"], add_special_tokens=False
    )["input_ids"]
    cls, a, brown, dog, sep = plain.input_ids
    assert marked.input_ids == [cls, a, *one, brown, *two, dog, sep]
    assert plain.first == (1, 2, 3) and [marked.input_ids[at] for at in marked.first] == [
        a,
        brown,
        dog,
    ]
    assert [label for label in marked.labels if label != -100] == plain.labels[1:-1]


def test_marks_are_refused_where_the_tokenizer_knows_case(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    cased = Path(shutil.copytree(tiny_encoder, tmp_path / "cased"))
    file = cased / "tokenizer.json"
    small = file.read_text()
    assert '"lowercase": true' in small
    file.write_text(small.replace('"lowercase": true', '"lowercase": false'))
    with pytest.raises(RecipeError, match=r"case_marks has no use.*by itself.*Remove case_marks"):
        with_marks(cased, tmp_path, room_rows())


def test_marks_are_refused_where_the_tokenizer_does_not_know_them(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    blind = Path(shutil.copytree(tiny_encoder, tmp_path / "blind"))
    file = blind / "tokenizer.json"
    known = file.read_text()
    assert '"^": 319' in known
    file.write_text(known.replace('"^": 319', '"\u00a4": 319'))
    with pytest.raises(
        RecipeError, match=r'no token for "\^", which is \[UNK\].*Remove case_marks'
    ):
        with_marks(blind, tmp_path, room_rows())


def test_words_and_tags_may_have_other_columns_and_tags_may_be_integers(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    train = write_rows(tmp_path / "t.jsonl", [{"words": ["a", "dog"], "ner_tags": [0, 1]}])
    made = recipe_from_dict(
        {
            "base": str(tiny_encoder),
            "stage": [
                {
                    "method": "token-classification",
                    "data": {"train": str(train), "tokens": "words", "tags": "{{ ner_tags }}"},
                }
            ],
        }
    )
    opened = open_folder(tiny_encoder, name="tiny")
    found = load_examples(made.stage[0], load_tokenizer(opened), opened)
    assert (
        found.labels == ("0", "1")
        and found.prompt_format.tokens == "words"
        and found.prompt_format.tags == "ner_tags"
    )
    assert recipe_from_dict(tomllib.loads(recipe_to_toml(made))) == made


BAD = [
    ({"tokens": ["a", "b"], "tags": ["O"]}, ["line 3", '"tags"', "expected 2 tags", "got 1"]),
    ({"tokens": "a b", "tags": ["O", "O"]}, ["line 3", '"tokens"', "no list of words", "str"]),
    ({"tokens": ["a"], "tags": "O"}, ["line 3", '"tags"', "no list of tags"]),
    ({"tokens": [], "tags": []}, ["line 3", '"tokens"', "an empty list"]),
    ({"tokens": ["a", None], "tags": ["O", "O"]}, ["line 3", "tokens[1]", "NoneType"]),
    ({"tokens": ["a"], "tags": [True]}, ["line 3", "tags[0]", "bool"]),
    ({"tokens": ["a"], "tags": [""]}, ["line 3", "tags[0]"]),
    ({"tokens": ["\ud83d"], "tags": ["O"]}, ["line 3", "tokens[0]"]),
    ({"tokens": ["a"]}, ["line 3", 'no column "tags"', "data.tags"]),
]


@pytest.mark.parametrize(("row", "parts"), BAD, ids=lambda value: "")
def test_a_bad_row_is_refused_with_its_place(
    tiny_encoder: Path, tmp_path: Path, row: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        tagged(tiny_encoder, tmp_path, [*room_rows()[:2], row])
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_rows_are_left_out_and_counted_where_the_recipe_says_so(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    rows = [*room_rows(), *(row for row, _ in BAD)]
    train = write_rows(tmp_path / "t.jsonl", rows)
    data = {"train": str(train), "skip_invalid": True}
    made = recipe_from_dict(
        {"base": str(tiny_encoder), "stage": [{"method": "token-classification", "data": data}]}
    )
    opened = open_folder(tiny_encoder, name="tiny")
    found = load_examples(made.stage[0], load_tokenizer(opened), opened)
    assert len(found.train) == len(room_rows()) and found.skipped == {"train": len(BAD)}


def test_a_tag_that_training_never_shows_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=(
            r'dev.jsonl, line 1.*"B-city" of word 2, "Rome", does not occur.*one of B-room,'
            r" I-room, O"
        ),
    ):
        tagged(
            tiny_encoder,
            tmp_path,
            room_rows(),
            [{"tokens": ["in", "Rome"], "tags": ["O", "B-city"]}],
        )


def test_one_tag_alone_is_nothing_to_learn(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to tell apart"):
        tagged(tiny_encoder, tmp_path, [{"tokens": ["a"], "tags": ["O"]}])


def test_a_decoder_is_refused_by_name(tiny_decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r'"token-classification" does not fit.*an encoder.*llama, a decoder'
    ):
        run_recipe(room_recipe(tiny_decoder, tmp_path), out=tmp_path / "run", progress=silent())


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"data": {"train": "t.jsonl", "tokens": "{{ a }} {{ b }}"}},
            "data.tokens is no column's name",
        ),
        (
            {"data": {"train": "t.jsonl", "text": "a"}},
            "data.text has no meaning for token-classification",
        ),
        (
            {"data": {"train": "t.jsonl"}, "problem": "multi-label"},
            "problem has no meaning for token-classification",
        ),
    ],
)
def test_settings_of_other_methods_are_refused(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from_dict({"base": "b", "stage": [{"method": "token-classification", **stage}]})


@pytest.mark.parametrize(
    ("train", "rate", "least"), [("lora", 3e-3, 0.9), ("head", 1e-2, 0.7), ("full", 1e-3, 0.9)]
)
def test_training_learns_the_tags_and_eval_finds_the_same(
    tiny_encoder: Path, tmp_path: Path, train: str, rate: float, least: float
) -> None:
    made = room_recipe(
        tiny_encoder, tmp_path, parameters={"train": train}, learning_rate=rate, epochs=20
    )
    summary = run_recipe(made, out=tmp_path / "run", progress=silent())
    assert summary.metrics["entity_f1"] > least and summary.effect["mean_kl"] > 0
    assert summary.data[0]["unseen_words"]["train"] == {"cut": 0, "no_sub_word": 0}
    evaluation = evaluate(tmp_path / "run", tmp_path / "rooms-dev.jsonl")
    measured = {name: value for name, value in summary.metrics.items() if name != "loss"}
    assert evaluation.metrics.pop("expected_calibration_error") < 0.2
    assert (
        evaluation.metrics == pytest.approx(measured) and evaluation.task == "token-classification"
    )
    assert evaluation.predictions[0]["tokens"] == room_rows()[0]["tokens"]


def test_validation_counts_words_that_were_cut_off(tiny_encoder: Path, tmp_path: Path) -> None:
    run_recipe(
        room_recipe(tiny_encoder, tmp_path, max_length=8), out=tmp_path / "run", progress=silent()
    )
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert metrics["entity_recall"] <= 0.5  # the long rows' rooms are beyond the eighth token
    evaluation = evaluate(tmp_path / "run", tmp_path / "rooms-dev.jsonl").metrics
    assert 0 <= evaluation.pop("expected_calibration_error") <= 1
    assert evaluation == pytest.approx(
        {name: value for name, value in metrics.items() if name != "loss"}
    )


def test_the_adapter_loads_in_peft_on_transformers_own_model(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    run_recipe(room_recipe(tiny_encoder, tmp_path), out=tmp_path / "run", progress=silent())
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    theirs = PeftModel.from_pretrained(
        BertForTokenClassification.from_pretrained(tiny_encoder, num_labels=3), str(adapter)
    ).eval()
    answers = TorchAnswers.open(tmp_path / "run")
    batch = answers.tokenizer(["turn on the old kitchen"], return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        torch.testing.assert_close(
            answers.model(**inputs), theirs(**inputs).logits, atol=1e-5, rtol=1e-5
        )


def test_a_head_alone_is_two_tensors(tiny_encoder: Path, tmp_path: Path) -> None:
    run_recipe(
        room_recipe(tiny_encoder, tmp_path, parameters={"train": "head"}),
        out=tmp_path / "run",
        progress=silent(),
    )
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "base_model.model.classifier.weight": (3, 64),
        "base_model.model.classifier.bias": (3,),
    }


def test_raw_text_may_come_first(tiny_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the kitchen is old. the garden is green. " * 20)
    tags = room_recipe(tiny_encoder, tmp_path)
    first = {
        "method": "masked-lm",
        "data": {"train": str(tmp_path / "text.txt")},
        "max_steps": 2,
        "precision": "fp32",
    }
    values = tomllib.loads(recipe_to_toml(tags))
    made = recipe_from_dict({**values, "stage": [first, *values["stage"]]})
    summary = run_recipe(made, out=tmp_path / "run", progress=silent())
    assert summary.task == "token-classification" and "entity_f1" in summary.metrics


def test_a_stopped_run_resumes_to_the_same_adapter(tiny_encoder: Path, tmp_path: Path) -> None:
    made = replace(
        room_recipe(tiny_encoder, tmp_path, epochs=3, parameters={"dropout": 0.2}),
        checkpoint_every=2,
    )
    run_recipe(made, out=tmp_path / "whole", progress=silent())
    stopped_at(4, made, tmp_path / "run")
    run_recipe(made, out=tmp_path / "run", progress=silent(), resume=True)
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_eval_refuses_a_tag_that_the_adapter_does_not_know(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    run_recipe(
        room_recipe(tiny_encoder, tmp_path, max_steps=1), out=tmp_path / "run", progress=silent()
    )
    write_rows(tmp_path / "new.jsonl", [{"tokens": ["Rome"], "tags": ["B-city"]}])
    with pytest.raises(DataError, match=r'new.jsonl, line 1.*"B-city".*not known to the adapter'):
        evaluate(tmp_path / "run", tmp_path / "new.jsonl")
