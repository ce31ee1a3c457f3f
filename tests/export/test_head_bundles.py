"""One encoder file for heads that tag words, name one label or several, give a number, or embed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import CommandLine
from export_helpers import plain_session
from head_helpers import HEADS, PARTS, ROOMS_TAGS, adapters, bundle, merged
from peft import LoraConfig, get_peft_model
from runtime_helpers import ENCODER_TARGETS, encoder_bundle
from training_helpers import write_rows
from transformers import AutoTokenizer, BertForTokenClassification

from edgetune.adapters.runs import load_adapted_model
from edgetune.core.errors import AdapterError, DataError, InputError
from edgetune.core.text import split_words
from edgetune.evaluation.evaluate import evaluate
from edgetune.evaluation.torch_answers import TorchAnswers
from edgetune.export.proof.probe import TEXTS, decide_by, token_outputs, torch_outputs
from edgetune.export.proof.proof import Outputs, prove
from edgetune.export.proof.prove import reprove
from edgetune.metrics.error_analysis import set_of
from edgetune.models.load import load_tokenizer
from edgetune.models.resolve import resolve_base
from edgetune.runtime import Runtime
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.bundle.manifest import read_manifest

WORDS = [
    ["Turn", "on", "the", "lights", "in", "the", "kitchen", ",", "please", "!"],
    ["dog"],
    ["The", "quick", "brown", "fox", "\u200b", "jumps", "over", "the", "lazy", "dog", "."],
]
TEXT = "My card hasn't arrived: what should I do?"


@pytest.fixture(scope="module")
def runtime(tiny_encoder: Path) -> Any:
    with Runtime.open(bundle(tiny_encoder), threads=1) as opened:
        yield opened


def test_every_kind_of_head_passes_its_proof_on_one_encoder(tiny_encoder: Path) -> None:
    manifest = read_manifest(bundle(tiny_encoder))
    assert {
        entry.name: (entry.task, entry.problem, entry.labels) for entry in manifest.adapters
    } == HEADS
    assert manifest.task == "sequence-classification"
    proofs = manifest.proof["adapters"]
    assert all(proofs[name]["passed"] and proofs[name]["max_abs"] < 1e-4 for name in HEADS)
    probe = manifest.proof["probe"]
    assert proofs["rooms"]["positions"] == sum(map(len, probe["rooms"])) and proofs["intent"][
        "positions"
    ] == len(probe["intent"])
    assert proofs["topics"]["positions"] == 3 * len(
        probe["topics"]
    )  # every token; a text; every label


def tags_of(answers: TorchAnswers, rows: Any) -> list[list[str]]:
    return [[one.label for one in tags] for tags in answers.scored_tags(rows)]


@pytest.mark.parametrize("name", ["rooms", "parts"])
def test_tags_are_torchs(tiny_encoder: Path, runtime: Runtime, name: str) -> None:
    expected = tags_of(TorchAnswers.open(adapters(tiny_encoder)[name]), WORDS)
    found = runtime.tag(WORDS, name)
    assert [row.tags for row in found] == expected
    assert len({tag for row in expected for tag in row}) > 1
    assert (
        found[2].words[4].tag == "O" and found[2].words[4].score == 0.0
    )  # a zero-width space has no sub-word


def test_scores_are_torchs_probabilities(tiny_encoder: Path, runtime: Runtime) -> None:
    model, tokenizer, _ = load_adapted_model(adapters(tiny_encoder)["rooms"])
    batch = tokenizer(" ".join(WORDS[0]), return_tensors="pt")
    with torch.no_grad():
        best = (
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
            .softmax(-1)
            .max(-1)
            .values
        )
    ids = batch.word_ids()
    assert ids.count(None) == 2
    found = [word.score for word in runtime.tag(WORDS[:1], "rooms")[0].words]
    np.testing.assert_allclose(
        found, [best[ids.index(at)] for at in range(len(WORDS[0]))], atol=1e-5
    )


def test_rows_of_one_batch_have_adapters_of_different_tag_counts(runtime: Runtime) -> None:
    mixed = runtime.tag([*WORDS, *WORDS], adapters=["rooms"] * 3 + ["parts"] * 3)
    alone = [
        *(runtime.tag([row], "rooms")[0] for row in WORDS),
        *(runtime.tag([row], "parts")[0] for row in WORDS),
    ]
    assert [row.tags for row in mixed] == [row.tags for row in alone]
    assert {tag for row in mixed[:3] for tag in row.tags} <= set(ROOMS_TAGS) and {
        tag for row in mixed[3:] for tag in row.tags
    } <= {*PARTS, "O"}


def test_a_plain_text_is_tagged_as_its_words_and_spans_count_in_it(runtime: Runtime) -> None:
    found = runtime.tag([TEXT], "rooms")[0]
    words = [TEXT[start:end] for start, end in split_words(TEXT)]
    assert (
        [TEXT[word.start : word.end] for word in found.words]
        == [word.word for word in found.words]
        == words
    )
    given = runtime.tag([words], "rooms")[0]
    assert given.tags == found.tags and given.text == " ".join(words)
    assert [given.text[word.start : word.end] for word in given.words] == words


def test_entities_have_a_type_a_text_and_the_least_certain_words_score(runtime: Runtime) -> None:
    for row in runtime.tag([TEXT, *WORDS], "rooms"):
        for entity in row.entities:
            inside = [word for word in row.words if entity.start <= word.start < entity.end]
            assert entity.type == "room" and row.text[entity.start : entity.end] == entity.text
            assert (
                entity.score == min(word.score for word in inside)
                and inside[0].tag[2:] == inside[-1].tag[2:] == "room"
            )
    assert any(row.entities for row in runtime.tag([TEXT, *WORDS], "rooms"))
    assert runtime.tag([TEXT], "parts")[0].entities == []


def test_no_words_have_no_tags(runtime: Runtime) -> None:
    assert [row.words for row in runtime.tag(["", [], " \n", "\u200b"], "rooms")][:3] == [
        (),
        (),
        (),
    ]
    assert runtime.tag([], "rooms") == []


def test_a_text_that_is_too_long_is_refused_or_cut(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="longer than the model's positions"):
        runtime.tag([["dog"] * 200], "rooms")
    tags = runtime.tag([["dog"] * 200], "parts", truncate=True)[0]
    assert (
        len(tags.words) == 200
        and [word.score > 0 for word in tags.words] == [True] * 30 + [False] * 170
    )  # max_length 32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rt: rt.classify(["a"], "rooms"), "Runtime.tag"),
        (lambda rt: rt.tag(["a"], "intent"), "tags no words.*rooms, parts"),
        (lambda rt: rt.tag(["a"]), "no adapter is chosen"),
        (lambda rt: rt.tag([["a", 3]], "rooms"), "list of strings"),
    ],
)
def test_the_wrong_question_is_refused(runtime: Runtime, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(runtime)


def test_classification_beside_taggers_is_torchs(tiny_encoder: Path, runtime: Runtime) -> None:
    answers = {
        name: TorchAnswers.open(adapters(tiny_encoder)[name])
        for name in ("intent", "topics", "warmth")
    }
    texts = [TEXT, *TEXTS]
    assert [found.label for found in runtime.classify(texts, "intent", truncate=True)] == [
        found.label for found in answers["intent"].scored(texts)
    ]
    several = runtime.classify(texts, "topics", truncate=True)
    assert [found.labels for found in several] == [
        set_of(scores) for scores in answers["topics"].scored_sets(texts)
    ]
    assert len({found.labels for found in several}) > 1
    numbers = runtime.classify(texts, "warmth", truncate=True)
    np.testing.assert_allclose(
        [found.value for found in numbers], answers["warmth"].values(texts), atol=1e-4
    )
    assert numbers[0].scores == {"value": numbers[0].value} and several[0].value is None


def test_each_of_several_labels_has_a_probability_of_its_own(
    tiny_encoder: Path, runtime: Runtime
) -> None:
    model, tokenizer, _ = load_adapted_model(adapters(tiny_encoder)["topics"])
    batch = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        expected = torch.sigmoid(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        )[0]
    found = runtime.classify([TEXT], "topics")[0]
    np.testing.assert_allclose(list(found.scores.values()), expected, atol=1e-5)
    assert found.labels == tuple(label for label, score in found.scores.items() if score >= 0.5)


def test_embeddings_come_from_the_same_file(tiny_encoder: Path, runtime: Runtime) -> None:
    model, tokenizer, _ = load_adapted_model(adapters(tiny_encoder)["rooms"])
    batch = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_base_model().pooled(batch["input_ids"], batch["attention_mask"])
    np.testing.assert_allclose(runtime.embed([TEXT], "rooms", normalize=False), expected, atol=1e-4)


def test_predict_answers_tokens_texts_and_every_kind_of_adapter(
    tiny_encoder: Path, tmp_path: Path, runtime: Runtime, command_line: CommandLine
) -> None:
    rows = [
        {"id": 1, "tokens": WORDS[0], "adapter": "rooms"},
        {"id": 2, "text": TEXT, "adapter": "rooms"},
        {"id": 3, "text": TEXT, "adapter": "intent"},
        {"id": 4, "text": TEXT, "adapter": "topics"},
        {"id": 5, "text": TEXT, "adapter": "warmth"},
        {"id": 6, "text": TEXT},
    ]
    source, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert command_line("predict", bundle(tiny_encoder), "--input", source, "--output", out)[0] == 0
    answered = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in answered] == [1, 2, 3, 4, 5, 6]
    assert (
        answered[0]["tags"] == runtime.tag(WORDS[:1], "rooms")[0].tags
        and answered[0]["tokens"] == WORDS[0]
    )
    assert [TEXT[start:end] for start, end in answered[1]["spans"]] == answered[1]["tokens"]
    assert all(
        set(entity) == {"type", "text", "start", "end", "score"}
        for entity in answered[1]["entities"]
    )
    assert set(answered[2]) - set(rows[2]) == {"label", "score"} and set(answered[3]) - set(
        rows[3]
    ) == {"labels", "scores"}
    assert set(answered[4]) - set(rows[4]) == {"value"} and set(answered[5]) - set(rows[5]) == {
        "embedding"
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": "a b"}, "no words"),
        ({"tokens": ["a", 1]}, "no words"),
        ({"x": 1}, "no `text`.*tokens"),
        ({"text": ""}, "`text` has a wrong value"),
    ],
)
def test_predict_refuses_rows_without_words(
    tiny_encoder: Path,
    tmp_path: Path,
    row: dict[str, Any],
    message: str,
    command_line: CommandLine,
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [row])
    out = tmp_path / "out.jsonl"
    code, _, error = command_line(
        "predict",
        bundle(tiny_encoder),
        "--adapter",
        "rooms",
        "--input",
        source,
        "--output",
        out,
    )
    assert code == 2 and re.search(message, error) and "line 1" in error and not out.exists()


@pytest.mark.parametrize("name", ["rooms", "topics", "warmth"])
def test_predict_shows_an_answer_to_one_text(
    tiny_encoder: Path, name: str, runtime: Runtime, command_line: CommandLine
) -> None:
    code, out, _ = command_line("predict", bundle(tiny_encoder), "--adapter", name, TEXT)
    assert code == 0
    if name == "rooms":
        tagged = runtime.tag([TEXT], name)[0].words
        assert out.splitlines() == [
            f"{word.word}\t{word.tag}\t{word.score:.4f}\t{word.start}-{word.end}" for word in tagged
        ]
    elif name == "topics":
        found = runtime.classify([TEXT], name)[0]
        labels = [f"{label}\t{found.scores[label]:.4f}" for label in found.labels or ()]
        assert out.splitlines() == (labels or ["(no label)"])
    else:
        assert float(out) == pytest.approx(runtime.classify([TEXT], name)[0].value, rel=1e-5)


@pytest.mark.parametrize("name", ["rooms", "topics", "warmth"])
def test_eval_of_the_bundle_is_eval_of_the_adapter(
    tiny_encoder: Path, tmp_path: Path, name: str
) -> None:
    gold: dict[str, list[dict[str, Any]]] = {
        "rooms": [
            {"tokens": words, "tags": [ROOMS_TAGS[len(word) % 3] for word in words]}
            for words in WORDS
        ],
        "topics": [
            {"text": text, "label": ["lights", "music"][: at % 3]} for at, text in enumerate(TEXTS)
        ],
        "warmth": [{"text": text, "label": at} for at, text in enumerate(TEXTS)],
    }
    data = write_rows(tmp_path / "rows.jsonl", gold[name])
    shipped, trained = (
        evaluate(bundle(tiny_encoder), data, adapter=name),
        evaluate(adapters(tiny_encoder)[name], data),
    )
    assert shipped.task == trained.task == HEADS[name][0]
    assert shipped.metrics == pytest.approx(trained.metrics, abs=1e-4) and shipped.rows == len(
        gold[name]
    )


def test_eval_of_the_bundle_refuses_unknown_labels(tiny_encoder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": ["heat"]}])
    with pytest.raises(DataError, match=r'"heat" is not known to the adapter.*some of lights'):
        evaluate(bundle(tiny_encoder), data, adapter="topics")


def test_a_merged_tagger_has_its_head_in_the_graph(tiny_encoder: Path) -> None:
    out = merged(tiny_encoder)
    manifest = read_manifest(out)
    assert (
        manifest.task == "token-classification"
        and manifest.head is None
        and manifest.adapters[0].task == "token-classification"
    )
    with Runtime.open(out, threads=1) as opened:
        in_torch = tags_of(TorchAnswers.open(adapters(tiny_encoder)["rooms"]), WORDS)
        assert [row.tags for row in opened.tag(WORDS)] == in_torch
    tokenizer = load_tokenizer(resolve_base(str(tiny_encoder)))
    batch = tokenizer([TEXT, "dog"], padding=True, return_tensors="np")
    feed = {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    assert plain_session(out).run(["logits"], feed)[0].shape == (2, batch["input_ids"].shape[1], 3)


def test_the_proof_can_be_repeated(tiny_encoder: Path) -> None:
    assert all(
        proof.passed
        for proof in reprove(merged(tiny_encoder), read_manifest(merged(tiny_encoder)), threads=1)[
            "onnxruntime"
        ].values()
    )


def test_the_proof_finds_a_tagger_whose_low_rank_change_is_missing(
    tiny_encoder: Path, runtime: Runtime
) -> None:
    manifest = read_manifest(bundle(tiny_encoder))
    rows, folder = manifest.proof["probe"]["rooms"], adapters(tiny_encoder)["rooms"] / "adapter"
    model, _, _ = load_adapted_model(folder)
    on, off = torch_outputs(model, rows, adapter=True), torch_outputs(model, rows, adapter=False)
    tensors = pack_adapter(folder, manifest).tensors
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}
    good, only_head = (
        token_outputs(runtime.encoder, rows, tensors),
        token_outputs(runtime.encoder, rows, head),
    )  # type: ignore[arg-type]
    assert prove(
        trained=on, trained_off=off, shipped=good, shipped_off=only_head, precision="fp32"
    ).passed
    assert not prove(
        trained=on, trained_off=off, shipped=only_head, shipped_off=only_head, precision="int4"
    ).passed


@pytest.mark.parametrize("problem", ["multi-label", "regression"])
def test_the_proof_of_other_answers_finds_what_a_softmax_would_not(problem: str) -> None:
    generator = np.random.default_rng(0)
    states, width = (
        generator.normal(size=(40, 8)).astype(np.float32),
        1 if problem == "regression" else 4,
    )
    logits = 3 * (states @ generator.normal(size=(8, width)).astype(np.float32)) + 5
    trained = Outputs(logits, states)
    decide = decide_by(problem, trained)
    off = decide(Outputs(np.zeros_like(logits), 0 * states))

    def proof(shipped: Any) -> Any:
        return prove(
            trained=decide(trained),
            trained_off=off,
            shipped=decide(Outputs(shipped, states)),
            shipped_off=off,
            precision="int8",
        )

    assert proof(logits).passed and proof(logits + 0.01 * states[:, :1]).passed
    assert not proof(logits - 10).passed  # the same for all labels: no softmax would change
    assert not proof(np.full_like(logits, logits.mean())).passed


def test_a_bundle_of_before_takes_a_tagger(tiny_encoder: Path) -> None:
    """The graph of a bundle with classifiers alone has had the tokens' states among its outputs all
    along.
    """
    with Runtime.open(encoder_bundle(tiny_encoder), threads=1) as opened:
        opened.load_adapter("rooms", adapters(tiny_encoder)["rooms"] / "adapter")
        in_torch = tags_of(TorchAnswers.open(adapters(tiny_encoder)["rooms"]), WORDS)
        assert [row.tags for row in opened.tag(WORDS, "rooms")] == in_torch
        with Runtime.open(encoder_bundle(tiny_encoder), threads=1) as alone:
            assert opened.classify([TEXT], "intent") == alone.classify([TEXT], "intent")


def test_an_adapter_that_peft_made_for_transformers_own_tagger_loads(
    tiny_encoder: Path, tmp_path: Path, runtime: Runtime
) -> None:
    torch.manual_seed(3)
    config = LoraConfig(task_type="TOKEN_CLS", r=4, lora_alpha=8, target_modules=ENCODER_TARGETS)
    theirs = get_peft_model(
        BertForTokenClassification.from_pretrained(tiny_encoder, num_labels=4), config
    ).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "foreign")
    packed = runtime.load_adapter("foreign", tmp_path / "foreign")
    assert packed.task == "token-classification" and "every token's state" in packed.notes[1]
    encoded = AutoTokenizer.from_pretrained(tiny_encoder)(
        WORDS[0], is_split_into_words=True, return_tensors="pt"
    )
    with torch.no_grad():
        best = (
            theirs(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
            .logits[0]
            .argmax(-1)
            .tolist()
        )
    expected = [f"LABEL_{best[encoded.word_ids().index(at)]}" for at in range(len(WORDS[0]))]
    assert runtime.tag(WORDS[:1], "foreign")[0].tags == expected


def test_plain_onnx_runtime_tags_with_the_shipped_adapter(
    tiny_encoder: Path, runtime: Runtime
) -> None:
    """As docs/reference/bundle.md says: last_hidden_state · head.weight + head.bias."""
    out = bundle(tiny_encoder)
    adapter, options = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(str(out / "adapters" / "rooms" / "rooms.onnx_adapter"))
    options.add_active_adapter(adapter)
    ids = runtime.text_ids("the kitchen lights")
    feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    states = plain_session(out).run(["last_hidden_state"], feed, options)[0][0]
    head = ort.AdapterFormat.read_adapter(
        str(out / "adapters" / "rooms" / "rooms.onnx_adapter")
    ).get_parameters()
    logits = states @ head["head.weight"].numpy()[0] + head["head.bias"].numpy()[0]
    expected, _ = runtime.encoder.tokens([ids], [runtime.bound("rooms")])  # type: ignore[union-attr]
    np.testing.assert_allclose(logits, expected[0], atol=1e-4)


def test_a_decoders_bundle_tags_nothing(tiny_encoder: Path, tiny_decoder: Path) -> None:
    manifest = replace(read_manifest(bundle(tiny_encoder)), task="text-generation", head=None)
    with pytest.raises(
        AdapterError,
        match="task: expected text-generation or reward or sequence-classification, got",
    ):
        pack_adapter(adapters(tiny_encoder)["rooms"] / "adapter", manifest)
