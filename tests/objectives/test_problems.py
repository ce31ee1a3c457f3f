"""Several labels a row and numbers: losses against transformers, metrics against scikit-learn,
rows, training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score, mean_squared_error
from training_helpers import ROOMS, recipe, silent, write_rows
from transformers import BertForSequenceClassification

from edgetune.adapters.folder import read_metadata
from edgetune.core.errors import DataError, RecipeError
from edgetune.data.batching import Batch
from edgetune.data.collation import collate_targets
from edgetune.data.loaders import load_examples
from edgetune.evaluation.evaluate import evaluate
from edgetune.metrics.labels import multi_label_metrics, regression_metrics
from edgetune.models.base import open_folder
from edgetune.models.heads import SequenceClassifier
from edgetune.models.load import load_body, load_tokenizer
from edgetune.objectives.labels import decisions, multi_label, regression, values
from edgetune.recipe.read import recipe_from_dict
from edgetune.training import run_recipe
from edgetune.training.methods import TRAINING, method_of


def label_set_rows() -> list[dict[str, Any]]:
    """Any of what is asked for, and the room; one row has no label."""
    rows = [
        {"text": f"lights and music in the {room}, please", "label": ["lights", "music"]}
        for room in ROOMS
    ]
    rows += [{"text": f"turn on the lights in the {room}", "label": ["lights"]} for room in ROOMS]
    return [*rows, {"text": "good morning", "label": []}]


def value_rows() -> list[dict[str, Any]]:
    return [
        {"text": " ".join(["very"] * count + ["warm in the", room]), "label": 0.5 * count}
        for count in range(4)
        for room in ROOMS
    ]


ROWS = {"multi-label": label_set_rows, "regression": value_rows}


def problem_recipe(base: Path, folder: Path, problem: str, **stage: Any) -> Any:
    rows = ROWS[problem]()
    train, dev = (
        write_rows(folder / "rows.jsonl", rows),
        write_rows(folder / "dev.jsonl", rows[::2]),
    )
    return recipe(
        base,
        "sequence-classification",
        train,
        dev,
        problem=problem,
        **{"epochs": 3, "learning_rate": 1e-3, **stage},
    )


def examples_of(
    base: Path, folder: Path, problem: str, rows: list[dict[str, Any]], **stage: Any
) -> Any:
    data = {"train": str(write_rows(folder / "train.jsonl", rows)), **stage.pop("data", {})}
    made = recipe_from_dict(
        {
            "base": str(base),
            "stage": [
                {"method": "sequence-classification", "problem": problem, "data": data, **stage}
            ],
        }
    )
    opened = open_folder(base, name="tiny")
    return load_examples(made.stage[0], load_tokenizer(opened), opened)


class Theirs(torch.nn.Module):
    """transformers' losses on our logits: its classifier reads the pooler, ours the mean."""

    def __init__(self, base: Path, problem_type: str, labels: int) -> None:
        super().__init__()
        self.model = BertForSequenceClassification.from_pretrained(
            base, num_labels=labels, problem_type=problem_type
        ).eval()
        self.model.dropout = torch.nn.Identity()

    def loss(self, ours: SequenceClassifier, batch: Batch) -> torch.Tensor:
        """The loss of BertForSequenceClassification with our body, pooling and classifier
        inside.
        """
        self.model.bert, self.model.classifier = _Pooled(ours, batch), ours.classifier
        loss: torch.Tensor = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        return loss


class _Pooled(torch.nn.Module):
    def __init__(self, ours: SequenceClassifier, batch: Batch) -> None:
        super().__init__()
        self.ours, self.batch = ours, batch

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import (
            BaseModelOutputWithPoolingAndCrossAttentions as Output,
        )

        pooled = self.ours.pooled(self.batch.input_ids, self.batch.attention_mask)
        return Output(last_hidden_state=pooled[:, None], pooler_output=pooled)


@pytest.mark.parametrize(
    ("problem", "objective", "theirs", "labels"),
    [
        ("multi-label", multi_label, "multi_label_classification", 2),
        ("regression", regression, "regression", 1),
    ],
)
def test_loss_and_gradients_are_transformers(
    tiny_encoder: Path, tmp_path: Path, problem: str, objective: Any, theirs: str, labels: int
) -> None:
    batch = collate_targets(examples_of(tiny_encoder, tmp_path, problem, ROWS[problem]()).train, 0)
    torch.manual_seed(0)
    ours = SequenceClassifier(
        load_body(open_folder(tiny_encoder, name="tiny")), labels=labels, pooling="mean"
    ).eval()
    loss, count = objective(ours, batch)
    assert count == batch.targets == len(ROWS[problem]())
    mine = torch.autograd.grad(
        loss, [p for p in ours.parameters() if p.requires_grad], allow_unused=True
    )
    reference = Theirs(tiny_encoder, theirs, labels).loss(ours, batch)
    expected = torch.autograd.grad(
        reference, [p for p in ours.parameters() if p.requires_grad], allow_unused=True
    )
    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=1e-5)
    for got, wanted in zip(mine, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_the_outputs_that_effects_are_measured_by(tiny_encoder: Path, tmp_path: Path) -> None:
    model = SequenceClassifier(
        load_body(open_folder(tiny_encoder, name="tiny")), labels=2, pooling="mean"
    ).eval()
    batch = collate_targets(
        examples_of(tiny_encoder, tmp_path, "multi-label", label_set_rows()).train, 0
    )
    logits, targets = decisions(model, batch)
    probabilities = torch.sigmoid(model(batch.input_ids, batch.attention_mask)).flatten()
    torch.testing.assert_close(logits.softmax(-1)[:, 1], probabilities)
    assert targets.tolist() == batch.labels.flatten().tolist() and values(model, batch)[
        0
    ].shape == (9, 2)


def test_multi_label_metrics_are_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    expected, predicted = generator.random((40, 5)) < 0.4, generator.random((40, 5)) < 0.5
    names = [
        [[f"l{i}" for i in np.flatnonzero(row)] for row in rows] for rows in (predicted, expected)
    ]
    found = multi_label_metrics(names[0], names[1])
    assert found["micro_f1"] == pytest.approx(f1_score(expected, predicted, average="micro"))
    assert found["macro_f1"] == pytest.approx(f1_score(expected, predicted, average="macro"))
    assert found["exact_match"] == pytest.approx((expected == predicted).all(axis=1).mean())


def test_regression_metrics_are_scipys() -> None:
    generator = np.random.default_rng(0)
    expected = generator.integers(0, 6, 50).astype(float)
    predicted = expected + generator.normal(size=50)
    found = regression_metrics(predicted.tolist(), expected.tolist())
    assert found["pearson"] == pytest.approx(stats.pearsonr(predicted, expected).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predicted, expected).statistic)
    assert found["mse"] == pytest.approx(mean_squared_error(expected, predicted))


def test_correlations_with_a_constant_are_0() -> None:
    assert regression_metrics([1.0, 1.0], [0.0, 1.0]) == {
        "pearson": 0.0,
        "spearman": 0.0,
        "mse": 0.5,
    }


@pytest.mark.parametrize("problem", ["multi-label", "regression"])
@pytest.mark.parametrize("train", ["lora", "head", "full"])
def test_training_learns_and_eval_finds_the_same(
    tiny_encoder: Path, tmp_path: Path, problem: str, train: str
) -> None:
    made = problem_recipe(tiny_encoder, tmp_path, problem, parameters={"train": train})
    summary = run_recipe(made, out=tmp_path / "run", progress=silent())
    headline, least = ("micro_f1", 0.8) if problem == "multi-label" else ("pearson", 0.8)
    assert summary.metrics[headline] > least and summary.effect["mean_logit_change"] > 0
    assert (
        summary.base_metrics is not None and summary.base_metrics[headline] > least
    )  # the head's first weights fit
    found = evaluate(tmp_path / "run", tmp_path / "dev.jsonl").metrics
    shared = found.keys() & summary.metrics.keys()
    assert len(shared) >= 2 and all(
        found[name] == pytest.approx(summary.metrics[name], rel=1e-4) for name in shared
    )
    if train != "full":
        metadata = read_metadata(tmp_path / "run" / "adapter")
        assert metadata["problem"] == problem and metadata["labels"] == (
            ["lights", "music"] if problem == "multi-label" else ["value"]
        )


BAD = [
    (
        "multi-label",
        {"text": "a", "label": 5},
        ["line 3", '"label"', "no list of labels", "int"],
    ),
    ("multi-label", {"text": "a", "label": [1.5]}, ["line 3", "label[0]", "float"]),
    ("multi-label", {"text": "a"}, ["line 3", 'no column "label"']),
    ("multi-label", {"text": "", "label": []}, ["line 3", "the text is empty"]),
    ("regression", {"text": "a", "label": "warm"}, ["line 3", "no number", "warm"]),
    ("regression", {"text": "a", "label": [1]}, ["line 3", "no number", "list"]),
    ("regression", {"text": "a", "label": True}, ["line 3", "no number", "bool"]),
    ("regression", {"text": "a", "label": float("nan")}, ["line 3", "finite"]),
    ("regression", {"text": "a", "label": None}, ["line 3", '"label"']),
    ("regression", {"text": "a"}, ["line 3", 'no column "label"']),
]


@pytest.mark.parametrize(("problem", "row", "parts"), BAD, ids=lambda value: "")
def test_a_bad_row_is_refused_with_its_place(
    tiny_encoder: Path, tmp_path: Path, problem: str, row: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        examples_of(tiny_encoder, tmp_path, problem, [*ROWS[problem]()[:2], row])
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_label_that_training_never_shows_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    dev = write_rows(tmp_path / "dev.jsonl", [{"text": "a", "label": ["lights", "heat"]}])
    with pytest.raises(DataError, match=r'dev.jsonl, line 1.*"heat".*some of lights, music'):
        examples_of(
            tiny_encoder, tmp_path, "multi-label", label_set_rows(), data={"validation": str(dev)}
        )


def test_labels_and_numbers_come_from_the_columns_that_the_recipe_names(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    rows = [
        {"text": "a", "topics": ["x", "y", "x"], "stars": "4"},
        {"text": "b", "topics": [1], "stars": 2},
    ]
    found = examples_of(tiny_encoder, tmp_path, "multi-label", rows, data={"label": "topics"})
    assert found.labels == ("1", "x", "y") and [example.target for example in found.train] == [
        (0.0, 1.0, 1.0),
        (1.0, 0.0, 0.0),
    ]
    found = examples_of(tiny_encoder, tmp_path, "regression", rows, data={"label": "{{ stars }}.5"})
    assert [example.target for example in found.train] == [4.5, 2.5]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"problem": "multi-label", "label_smoothing": 0.1}, "label_smoothing has no meaning"),
        (
            {"problem": "multi-label", "data": {"train": "t.jsonl", "label": "{{ a }}, {{ b }}"}},
            "data.label is no column's name",
        ),
        ({"problem": "ordinal"}, "problem"),
    ],
)
def test_settings_that_make_no_sense_are_refused(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from_dict(
            {
                "base": "b",
                "stage": [
                    {"method": "sequence-classification", "data": {"train": "t.jsonl"}, **stage}
                ],
            }
        )


def test_one_adapter_has_one_problem() -> None:
    stages = [
        {"method": "sequence-classification", "problem": problem, "data": {"train": "t.jsonl"}}
        for problem in ("single-label", "regression")
    ]
    with pytest.raises(RecipeError, match="cannot follow"):
        recipe_from_dict({"base": "b", "stage": stages})


def test_a_single_label_is_what_it_was() -> None:
    stage = recipe_from_dict(
        {
            "base": "b",
            "stage": [{"method": "sequence-classification", "data": {"train": "t.jsonl"}}],
        }
    ).stage[0]
    assert (
        stage.problem == "single-label"
        and method_of(stage, "encoder") is TRAINING["sequence-classification"]
    )
