"""`contrastive`: the loss of sentence-transformers, embeddings that get better, bundles that give
them, and classifiers that start from them.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_helpers import export
from resume_helpers import WEIGHTS, stopped_at
from training_helpers import ROOMS, intent_recipe, intent_rows, recipe, silent, write_rows

from edgetune.core.errors import DataError, EdgetuneError, RecipeError
from edgetune.core.files import sha256_file
from edgetune.data.contrasts import ContrastExample
from edgetune.data.loaders import load_examples
from edgetune.evaluation.evaluate import evaluate
from edgetune.models.base import open_folder
from edgetune.models.heads import Embedder
from edgetune.models.load import load_body, load_tokenizer
from edgetune.objectives.contrastive import (
    ContrastBatch,
    collate_contrasts,
    contrastive,
    cosent,
    embedded,
)
from edgetune.recipe.schema import Recipe
from edgetune.runtime import Runtime
from edgetune.training import run_recipe

TEXTS = ("turn on the lights", "make the hall warmer", "play a song", "where is my card")
ALIKE = ("lights on, please", "heat the hall", "some music", "my card is gone")


def reference_loss(anchors: torch.Tensor, others: torch.Tensor, scale: float) -> torch.Tensor:
    """MultipleNegativesRankingLoss as sentence-transformers 5 computes it."""
    scores = F.normalize(anchors, dim=-1) @ F.normalize(others, dim=-1).T * scale
    return F.cross_entropy(scores, torch.arange(len(anchors)))


def reference_cosent(cosines: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    """CoSENTLoss as sentence-transformers 5 computes it."""
    scores = cosines * scale
    scores = scores[:, None] - scores[None, :]
    order = (labels[:, None] < labels[None, :]).float()
    scores = (scores - (1 - order) * 1e12).view(-1)
    return torch.logsumexp(torch.cat((torch.zeros(1), scores)), dim=0)


def tiny(base_folder: Path) -> tuple[Any, Any]:
    """An untrained embedder, and its tokenizer."""
    base = open_folder(base_folder, name="tiny")
    return Embedder(load_body(base), pooling="mean").eval(), load_tokenizer(base)


def batch_of(tokenizer: Any, *columns: tuple[str, ...], targets: Any = None) -> ContrastBatch:
    rows = zip(*columns, strict=True)
    examples = []
    for line, texts in enumerate(rows):
        first, *others = (tokenizer(text)["input_ids"] for text in texts)
        target = None if targets is None else targets[line]
        examples.append(ContrastExample(first, tuple(others), line, target))
    return collate_contrasts(examples, tokenizer.pad_token_id or 0)


@torch.no_grad()
def alone(model: Any, tokenizer: Any, texts: tuple[str, ...]) -> torch.Tensor:
    """Each text's pooled state, computed without a batch."""
    states = [model.body(**tokenizer(text, return_tensors="pt")) for text in texts]
    return torch.cat([state.last_hidden_state.mean(1) for state in states])


@pytest.mark.parametrize("triplets", [False, True])
def test_the_loss_is_that_of_sentence_transformers(tiny_encoder: Path, triplets: bool) -> None:
    model, tokenizer = tiny(tiny_encoder)
    unlike = ("nothing", "at all", "of it", ALIKE[0])
    columns = (TEXTS, ALIKE, unlike) if triplets else (TEXTS, ALIKE)
    loss, rows = contrastive(model, batch_of(tokenizer, *columns), scale=20.0)
    embedded = [alone(model, tokenizer, column) for column in columns]
    if triplets:  # the texts that are equal to another row's own stay out
        expected = reference_loss(embedded[0], torch.cat(embedded[1:]), 20.0)
        assert loss < expected
    else:
        expected = reference_loss(embedded[0], embedded[1], 20.0)
        assert torch.allclose(loss, expected, atol=1e-5)
    assert rows == 4 and loss.requires_grad


def test_of_pairs_with_a_number_it_is_cosent(tiny_encoder: Path) -> None:
    model, tokenizer = tiny(tiny_encoder)
    scores = [0.1, 0.9, 0.5, 0.5]
    loss, _ = contrastive(model, batch_of(tokenizer, TEXTS, ALIKE, targets=scores), scale=20.0)
    first, second = (alone(model, tokenizer, texts) for texts in (TEXTS, ALIKE))
    cosines = F.cosine_similarity(first, second)
    assert torch.allclose(loss, reference_cosent(cosines, torch.tensor(scores), 20.0), atol=1e-5)
    assert cosent(cosines, torch.ones(4), scale=20.0) == 0.0  # nothing is said of their order


@pytest.mark.parametrize(
    ("columns", "classes", "expected"),
    [
        ((("a", "b"), ("c", "c")), None, [[1, 0], [0, 1]]),  # equal positives
        ((("a", "a"), ("c", "d")), None, [[1, 0], [0, 1]]),  # equal anchors
        ((("a", "b"), ("c", "a")), None, [[1, 0], [1, 1]]),  # an anchor elsewhere
        ((("a", "b"), ("c", "d")), ("x", "x"), [[1, 0], [0, 1]]),  # one label
        ((("a", "b"), ("c", "d")), ("x", "y"), [[1, 1], [1, 1]]),
    ],
)
def test_texts_that_are_alike_are_no_negatives(
    tiny_encoder: Path, columns: Any, classes: Any, expected: list[list[int]]
) -> None:
    _, tokenizer = tiny(tiny_encoder)
    batch = batch_of(tokenizer, *columns, targets=classes)
    assert batch.told_apart is not None and batch.told_apart.int().tolist() == expected


def labelled(base: Path, folder: Path, **stage: Any) -> Recipe:
    """Texts with the room they speak of: the untrained base puts those of an intent together."""
    rows = [
        {"text": row["text"], "label": next(room for room in ROOMS if room in row["text"])}
        for row in intent_rows()
    ]
    train = write_rows(folder / "rows.jsonl", rows)
    return recipe(base, "contrastive", train, write_rows(folder / "dev.jsonl", rows), **stage)


def pairs(base: Path, folder: Path, **stage: Any) -> Recipe:
    rows = [
        {"anchor": one["text"], "positive": f"{one['label']} of the {one['text'].split()[-1]}"}
        for one in intent_rows()
    ]
    train = write_rows(folder / "pairs.jsonl", rows)
    return recipe(base, "contrastive", train, train, **stage)


def scored(base: Path, folder: Path, **stage: Any) -> Recipe:
    alike = [
        {"sentence1": a["text"], "sentence2": b["text"], "score": float(a["label"] != b["label"])}
        for a, b in itertools.combinations(intent_rows()[:7], 2)
    ]
    train = write_rows(folder / "scored.jsonl", alike)
    return recipe(base, "contrastive", train, train, **stage)


@pytest.mark.parametrize(
    ("make", "metric", "train"),
    [
        (labelled, "accuracy", "full"),
        (pairs, "mrr", "lora"),
        (scored, "spearman", "lora"),
    ],
)
def test_embeddings_get_better(
    tiny_encoder: Path, tmp_path: Path, make: Any, metric: str, train: str
) -> None:
    rate = 1e-2 if train == "lora" else 1e-3
    wanted = make(tiny_encoder, tmp_path, epochs=4, learning_rate=rate, parameters={"train": train})
    summary = run_recipe(wanted, out=tmp_path / "run", progress=silent())
    assert summary.task == "feature-extraction" and summary.base_metrics is not None
    assert summary.metrics[metric] > summary.base_metrics[metric]
    measured = evaluate(tmp_path / "run", Path(str(wanted.stage[0].data.validation)))
    assert measured.metrics[metric] == pytest.approx(summary.metrics[metric], abs=0.1)


@pytest.mark.parametrize("mode", ["separate", "merged"])
def test_a_bundle_gives_the_embeddings(tiny_encoder: Path, tmp_path: Path, mode: str) -> None:
    wanted = labelled(tiny_encoder, tmp_path)
    run_recipe(wanted, out=tmp_path / "near", progress=silent())
    manifest = export(tmp_path / "bundle", tmp_path / "near", mode=mode)
    assert manifest.adapters[0].task == "feature-extraction"
    with Runtime.open(tmp_path / "bundle", threads=1) as runtime:
        found = runtime.embed(TEXTS, "near")
    from edgetune.evaluation.torch_answers import TorchAnswers

    assert np.allclose(found, TorchAnswers.open(tmp_path / "near").embed(TEXTS), atol=1e-5)
    rows = Path(str(wanted.stage[0].data.validation))
    measured = evaluate(tmp_path / "bundle", rows)
    assert measured.metrics == pytest.approx(evaluate(tmp_path / "near", rows).metrics, abs=1e-3)


def test_a_classifier_may_start_from_embeddings(tiny_encoder: Path, tmp_path: Path) -> None:
    """As SetFit: contrastive first, then a head on what it learned, in one recipe."""
    second = intent_recipe(tiny_encoder, tmp_path)
    first = replace(second.stage[0], method="contrastive")
    both = replace(second, stage=(first, *second.stage))
    summary = run_recipe(both, out=tmp_path / "run", progress=silent())
    assert summary.task == "sequence-classification" and summary.metrics["accuracy"] > 0.5
    assert [stage["method"] for stage in summary.stages] == [
        "contrastive",
        "sequence-classification",
    ]


def test_a_killed_stage_goes_on_bit_for_bit(tiny_encoder: Path, tmp_path: Path) -> None:
    wanted = replace(
        labelled(tiny_encoder, tmp_path, parameters={"dropout": 0.1}), checkpoint_every=3
    )
    run_recipe(wanted, out=tmp_path / "whole", progress=silent())
    stopped_at(5, wanted, tmp_path / "run")
    run_recipe(wanted, out=tmp_path / "run", progress=silent(), resume=True)
    assert sha256_file(tmp_path / "run" / WEIGHTS) == sha256_file(tmp_path / "whole" / WEIGHTS)


def test_the_shape_of_rows_is_read_off_their_columns(tiny_encoder: Path, tmp_path: Path) -> None:
    base = open_folder(tiny_encoder, name="tiny")
    tokenizer = load_tokenizer(base)
    notes = [
        load_examples(make(tiny_encoder, tmp_path).stage[0], tokenizer, base).notes["train"]
        for make in (labelled, pairs, scored)
    ]
    assert "label: '{{ label }}'" in notes[0] and "alike: '{{ positive }}'" in notes[1]
    assert {"alike: '{{ sentence2 }}'", "label: '{{ score }}'"} <= {*notes[2]}


SAME = [{"anchor": "a", "positive": "a"}, {"anchor": "b", "positive": "c"}]


@pytest.mark.parametrize(
    ("rows", "stage", "error", "message"),
    [
        (SAME, {}, DataError, "line 1: two of the row's texts are the same"),
        ([{"text": "a", "label": "x"}] * 3, {}, DataError, "say of no two texts"),
        (SAME[1:] * 3, {"batch_size": 1}, RecipeError, "batch_size"),
        ([{"anchor": "a"}], {}, DataError, "label"),
        ([{"text": "a", "text_pair": "b", "score": "high"}], {}, DataError, "no number"),
    ],
)
def test_rows_that_teach_nothing_are_one_line(
    tiny_encoder: Path,
    tmp_path: Path,
    rows: list[Any],
    stage: dict[str, Any],
    error: type[EdgetuneError],
    message: str,
) -> None:
    train = write_rows(tmp_path / "rows.jsonl", rows)
    base = open_folder(tiny_encoder, name="tiny")
    wanted = recipe(tiny_encoder, "contrastive", train, None, **stage).stage[0]
    with pytest.raises(error) as raised:
        load_examples(wanted, load_tokenizer(base), base)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_the_run_says_what_it_measured(tiny_encoder: Path, tmp_path: Path) -> None:
    run_recipe(pairs(tiny_encoder, tmp_path), out=tmp_path / "run", progress=silent())
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert set(metrics) == {"recall_at_1", "recall_at_10", "mrr"}


def test_equal_texts_have_equal_embeddings_in_any_batch(tiny_encoder: Path) -> None:
    model, tokenizer = tiny(tiny_encoder)
    batch = batch_of(tokenizer, ("a long text of some words", "a"), ("a", "b"))
    anchors, others = embedded(model, batch)
    assert torch.allclose(anchors[1], others[0], atol=1e-6) and batch.keys[1] == batch.keys[2]
