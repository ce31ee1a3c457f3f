"""Two texts in a row, from the recipe to the device: types of tokens, cutting and numbers as in
transformers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CommandLine
from export_helpers import export, make_adapter, plain_session
from server_helpers import Running, serve
from training_helpers import silent, write_rows
from transformers import BertForSequenceClassification

from edgetune.core.errors import AdapterError, DataError, InputError, RecipeError
from edgetune.core.text import PairIds, lengths_within
from edgetune.data.collation import collate
from edgetune.data.loaders import load_examples
from edgetune.evaluation.evaluate import evaluate
from edgetune.evaluation.torch_answers import TorchAnswers
from edgetune.export.proof.prove import reprove
from edgetune.models.base import open_folder
from edgetune.models.heads import build_classifier
from edgetune.models.load import load_body, load_tokenizer
from edgetune.objectives.labels import regression
from edgetune.recipe.read import recipe_from_dict
from edgetune.recipe.schema import Recipe
from edgetune.runtime import Runtime
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.runtime.bundle.tokenizer import BundleTokenizer
from edgetune.runtime.scheduler.scheduler import Scheduler
from edgetune.training import run_recipe

WORDS = [
    "turn",
    "on",
    "the",
    "lights",
    "in",
    "kitchen",
    "my",
    "card",
    "has",
    "not",
    "arrived",
    "yet",
    "what",
    "should",
    "i",
    "do",
    "quick",
    "brown",
    "fox",
]
PAIRS = [
    ("turn on the lights", "the lights in the kitchen!"),
    ("my card", "what should I do?"),
    ("the fox " * 30, "quick"),
    ("x", "the dog " * 40),
]


def pair_rows(count: int = 24) -> list[dict[str, Any]]:
    """Two texts of which the second repeats the first's words as often as the score says."""
    draw = random.Random(0)
    rows = []
    for i in range(count):
        first = draw.sample(WORDS, 4)
        shared = i % 5
        second = first[:shared] + draw.sample(WORDS, 4 - shared) if shared < 5 else first
        rows.append(
            {"sentence1": " ".join(first), "sentence2": " ".join(second), "score": float(shared)}
        )
    return rows


def similar_recipe(
    base: Path, folder: Path, *, problem: str = "regression", **stage: Any
) -> Recipe:
    rows = pair_rows()
    if problem == "single-label":
        rows = [{**row, "score": "same" if row["score"] > 2 else "other"} for row in rows]
    train, held_out = (
        write_rows(folder / "pairs.jsonl", rows),
        write_rows(folder / "pairs-dev.jsonl", rows[:6]),
    )
    settings = {
        "epochs": 4,
        "batch_size": 6,
        "learning_rate": 5e-3,
        "max_length": 32,
        "precision": "fp32",
        "problem": problem,
        **stage,
    }
    columns = {"text": "sentence1", "text_pair": "sentence2", "label": "score"}
    data = {"train": str(train), "validation": str(held_out), **columns}
    return recipe_from_dict(
        {
            "base": str(base),
            "stage": [{"method": "sequence-classification", "data": data, **settings}],
            "threads": 1,
        }
    )


@cache
def runs(base: Path) -> dict[str, Path]:
    """A regression and a classification of pairs."""
    root = base.parent / f"{base.name}-pairs"
    root.mkdir()
    for name, problem in (("similar", "regression"), ("same", "single-label")):
        (root / f"{name}-data").mkdir()
        run_recipe(
            similar_recipe(base, root / f"{name}-data", problem=problem),
            out=root / name,
            progress=silent(),
        )
    (root / "same-data" / "pairs-dev.jsonl").unlink()  # its probe is of plain texts, in pairs
    return {name: root / name for name in ("similar", "same")}


@cache
def bundle(base: Path) -> Path:
    """Both, and a classifier of one text, on one fp32 encoder."""
    out = base.parent / f"{base.name}-pairs-bundle"
    export(
        out,
        *runs(base).values(),
        make_adapter(base, base.parent / f"{base.name}-single" / "single"),
    )
    return out


@pytest.fixture(scope="module")
def runtime(tiny_encoder: Path) -> Any:
    with Runtime.open(bundle(tiny_encoder), threads=1) as opened:
        yield opened


def test_examples_are_the_tokenizers_pairs(tiny_encoder: Path, tmp_path: Path) -> None:
    base = open_folder(tiny_encoder, name="tiny")
    tokenizer = load_tokenizer(base)
    examples: list[Any] = load_examples(
        similar_recipe(tiny_encoder, tmp_path, max_length=9).stage[0], tokenizer, base
    ).train
    firsts, seconds = (
        [row["sentence1"] for row in pair_rows()],
        [row["sentence2"] for row in pair_rows()],
    )
    batch = collate(examples, tokenizer.pad_token_id)
    expected = tokenizer(
        firsts,
        seconds,
        truncation="longest_first",
        max_length=9,
        padding=True,
        return_token_type_ids=True,
        return_tensors="pt",
    )
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        torch.testing.assert_close(getattr(batch, name), expected[name])
    assert batch.token_type_ids is not None and batch.token_type_ids.sum() > 0


def test_the_loss_of_pairs_is_transformers(tiny_encoder: Path, tmp_path: Path) -> None:
    base = open_folder(tiny_encoder, name="tiny")
    tokenizer = load_tokenizer(base)
    examples: list[Any] = load_examples(
        similar_recipe(tiny_encoder, tmp_path).stage[0], tokenizer, base
    ).train[:6]
    from edgetune.data.collation import collate_targets

    batch = collate_targets(examples, tokenizer.pad_token_id)
    torch.manual_seed(0)
    ours = build_classifier(
        load_body(base), task="sequence-classification", labels=1, pooling="cls"
    ).eval()
    theirs = BertForSequenceClassification.from_pretrained(tiny_encoder, num_labels=1).eval()
    theirs.bert = ours.body
    theirs.bert.pooler = torch.nn.Module()
    theirs.bert.pooler.forward = lambda hidden: hidden[:, 0]  # our head reads the state itself
    theirs.classifier = ours.classifier
    loss, _ = regression(ours, batch)
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "token_type_ids": batch.token_type_ids,
    }
    torch.testing.assert_close(
        loss, theirs(**inputs, labels=batch.labels).loss, atol=1e-6, rtol=1e-6
    )
    untyped, _ = regression(ours, replace(batch, token_type_ids=None))
    assert abs((untyped - loss).item()) > 1e-4


def test_the_device_cuts_and_types_pairs_as_transformers_does(tiny_encoder: Path) -> None:
    folder = bundle(tiny_encoder)
    ours, theirs = (
        BundleTokenizer(folder, read_manifest(folder)),
        load_tokenizer(open_folder(tiny_encoder, name="tiny")),
    )
    draw = random.Random(1)
    for most in range(3, 24):
        first, second = (" ".join(draw.choices(WORDS, k=draw.randint(1, 14))) for _ in range(2))
        expected = theirs(
            first, second, truncation="longest_first", max_length=most, return_token_type_ids=True
        )
        found = ours.encode_text((first, second), max_tokens=most)
        assert list(found) == expected["input_ids"], (most, first, second)
        assert isinstance(found, PairIds) and found.second == expected["token_type_ids"].index(1)


def test_the_longer_text_is_cut_first() -> None:
    assert [
        lengths_within(*case)
        for case in ((3, 4, 9), (2, 9, 6), (9, 2, 6), (9, 9, 7), (9, 8, 7), (7, 9, 4))
    ] == [
        (3, 4),
        (2, 4),
        (4, 2),
        (3, 4),
        (4, 3),
        (2, 2),
    ]


def test_pairs_pass_their_proof_beside_texts(tiny_encoder: Path) -> None:
    manifest = read_manifest(bundle(tiny_encoder))
    proofs = manifest.proof["adapters"]
    assert manifest.graph.token_type_ids and all(
        proofs[name]["passed"] and proofs[name]["max_abs"] < 1e-4
        for name in ("similar", "same", "single")
    )
    assert set(manifest.proof["second"]) == {"similar", "same"}
    again = reprove(bundle(tiny_encoder), manifest, threads=1)
    assert all(
        proof.passed and proof.strength == pytest.approx(proofs[name]["strength"], rel=1e-5)
        for name, proof in again["onnxruntime"].items()
    )


def test_numbers_and_labels_of_pairs_are_torchs(tiny_encoder: Path, runtime: Runtime) -> None:
    similar, same = (TorchAnswers.open(run) for run in runs(tiny_encoder).values())
    found = runtime.classify(PAIRS, "similar", truncate=True)
    np.testing.assert_allclose([one.value for one in found], similar.values(PAIRS), atol=1e-5)
    labels = [one.label for one in runtime.classify(PAIRS, "same", truncate=True)]
    assert labels == [one.label for one in same.scored(PAIRS)]
    turned = runtime.classify([(second, first) for first, second in PAIRS[:2]], "similar")
    assert abs((turned[0].value or 0) - (found[0].value or 0)) > 1e-4  # the order of the two counts


def test_pairs_and_texts_share_a_batch(runtime: Runtime) -> None:
    texts: list[Any] = [PAIRS[0], "the lights", PAIRS[1], "my card"]
    names = ["similar", "single", "same", "single"]
    mixed = runtime.classify(texts, adapters=names)
    alone = [runtime.classify([text], name)[0] for text, name in zip(texts, names, strict=True)]
    for one, other in zip(mixed, alone, strict=True):
        np.testing.assert_allclose(
            list(one.scores.values()), list(other.scores.values()), atol=1e-5
        )
    with Scheduler(runtime) as scheduler:
        futures = [
            scheduler.classify([text], name) for text, name in zip(texts, names, strict=True)
        ]
        for future, other in zip(futures, alone, strict=True):
            np.testing.assert_allclose(
                list(future.result(30)[0].scores.values()), list(other.scores.values()), atol=1e-5
            )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda rt: rt.classify(["a"], "similar"),
            "'similar' reads two texts at once.*got one text",
        ),
        (lambda rt: rt.classify([("a", "b")], "single_"), "unknown adapter"),
        (
            lambda rt: rt.classify([("the dog " * 60, "the dog " * 60)], "same"),
            "longer than the model's positions",
        ),
    ],
)
def test_what_does_not_fit_is_refused(runtime: Runtime, call: Any, message: str) -> None:
    with pytest.raises((InputError, AdapterError), match=message):
        call(runtime)


def test_eval_of_pairs_is_that_of_the_run(tiny_encoder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows(10))
    run, shipped = (
        evaluate(runs(tiny_encoder)["similar"], data),
        evaluate(bundle(tiny_encoder), data, adapter="similar"),
    )
    assert shipped.metrics == pytest.approx(run.metrics, abs=1e-4) and "spearman" in shipped.metrics
    write_rows(data, [{"sentence1": "a", "score": 1.0}])
    with pytest.raises(DataError, match='no column "sentence2"'):
        evaluate(bundle(tiny_encoder), data, adapter="similar")


def test_predict_reads_two_columns(
    tiny_encoder: Path, tmp_path: Path, runtime: Runtime, command_line: CommandLine
) -> None:
    (first, second), out = PAIRS[0], tmp_path / "out.jsonl"
    rows = [
        {"sentence1": first, "sentence2": second, "adapter": "similar"},
        {"text": first, "text_pair": second, "adapter": "same"},
        {"text": first, "adapter": "single"},
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    assert command_line("predict", bundle(tiny_encoder), "--input", source, "--output", out)[0] == 0
    answered = [json.loads(line) for line in out.read_text().splitlines()]
    assert answered[0]["value"] == pytest.approx(
        runtime.classify([PAIRS[0]], "similar")[0].value, abs=1e-5
    )
    assert answered[1]["label"] == runtime.classify([PAIRS[0]], "same")[0].label and set(
        answered[2]
    ) - set(rows[2]) == {"label", "score"}
    code, _, error = command_line("predict", bundle(tiny_encoder), "--adapter", "same", "one text")
    assert code == 2 and "reads two texts" in error and error.count("\n") == 1
    write_rows(source, [{"text": first}])
    code, _, error = command_line(
        "predict",
        bundle(tiny_encoder),
        "--adapter",
        "same",
        "--input",
        source,
        "--output",
        out,
    )
    assert code == 2 and "no `text_pair`" in error and "line 1" in error


def test_plain_onnx_runtime_takes_types_or_leaves_them_out(
    tiny_encoder: Path, runtime: Runtime
) -> None:
    import onnxruntime as ort

    ids = runtime.text_ids(PAIRS[0], "similar")
    assert isinstance(ids, PairIds)
    feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    types = {"token_type_ids": (np.arange(len(ids))[None] >= ids.second).astype(np.int64)}
    adapter, options = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(str(bundle(tiny_encoder) / "adapters" / "similar" / "similar.onnx_adapter"))
    options.add_active_adapter(adapter)
    session = plain_session(bundle(tiny_encoder))
    assert session.run(["logits"], {**feed, **types}, options)[0][0, 0] == pytest.approx(
        runtime.classify([PAIRS[0]], "similar")[0].value, abs=1e-5
    )
    assert (
        abs(
            session.run(["logits"], feed, options)[0]
            - session.run(["logits"], {**feed, **types}, options)[0]
        ).max()
        > 1e-4
    )


def test_a_graph_without_types_takes_no_pairs(tiny_encoder: Path) -> None:
    manifest = read_manifest(bundle(tiny_encoder))
    older = replace(manifest, graph=replace(manifest.graph, token_type_ids=False))
    with pytest.raises(AdapterError, match="takes no token types; export the bundle again"):
        pack_adapter(runs(tiny_encoder)["similar"] / "adapter", older)


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        (
            "token-classification",
            {"text_pair": "b"},
            "text_pair has no meaning for token-classification",
        ),
        (
            "sequence-classification",
            {"text_pair": "b", "label_names": True},
            "label_names has no meaning with text_pair",
        ),
    ],
)
def test_only_classification_reads_two_texts(
    method: str, data: dict[str, Any], message: str, tiny_encoder: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from_dict(
            {
                "base": str(tiny_encoder),
                "stage": [{"method": method, "data": {"train": "x.jsonl", **data}}],
            }
        )


@pytest.fixture(scope="module")
def server(tiny_encoder: Path) -> Iterator[Running]:
    with serve(bundle(tiny_encoder)) as running:
        yield running


def test_the_server_classifies_and_scores_pairs(server: Running) -> None:
    expected = server.runtime.classify(PAIRS[:2], "similar")
    firsts, seconds = zip(*PAIRS[:2], strict=True)
    scored = server.post(
        "/score", {"model": "similar", "text_1": list(firsts), "text_2": list(seconds)}
    ).json()
    np.testing.assert_allclose(
        [row["score"] for row in scored["data"]], [one.value for one in expected], atol=1e-5
    )
    one = server.post(
        "/score", {"model": "similar", "text_1": [firsts[0]], "text_2": list(seconds)}
    ).json()
    assert len(one["data"]) == 2 and one["data"][0] == scored["data"][0]
    long = server.post(
        "/score", {"model": "similar", "text_1": "music " * 300, "text_2": "b"}
    ).json()["error"]
    assert (long["code"], long["param"]) == ("context_length_exceeded", "text_2")
    classified = server.post(
        "/classify", {"model": "same", "input": [list(pair) for pair in PAIRS[:2]]}
    ).json()
    assert [row["label"] for row in classified["data"]] == [
        one.label for one in server.runtime.classify(PAIRS[:2], "same")
    ]
    for path, body in (
        ("/classify", {"model": "same", "input": "one"}),
        ("/classify", {"model": "same", "input": [["a", "b", "c"]]}),
        ("/score", {"model": "same", "text_1": "a", "text_2": "b"}),
    ):
        assert server.post(path, body).status_code == 400
