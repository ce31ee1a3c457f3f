"""How far an encoder's scores can be believed, and which of them tell rows apart that are none of
its labels: Banking77 with ten labels held out of training; a table, then one JSON line.

    EDGETUNE_DATASETS=FOLDER python benchmarks/confidence.py [--seeds 0 1 2] [--shots 10]
    [--epochs 10] [--precision int8 int4]

Near rows are test rows of the ten labels, far ones requests to a smart speaker (SNIPS) and short
messages (SMS spam). Every score is judged by its recall of these where 95 of 100 other test rows
are answered. The last lines are what a user gets: `[confidence] answered = 0.95`, fitted on five
validation rows a label, in torch and in bundles, which fit it again ("as trained": which do not).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax
from sklearn.metrics import roc_auc_score

from edgetune.evaluation.evaluate import evaluate
from edgetune.evaluation.torch_answers import TorchAnswers
from edgetune.export.bundle import export_bundle
from edgetune.export.graph.trace import Traced
from edgetune.export.proof.task_metric import TaskPlan
from edgetune.metrics.calibration import calibration_error, reliability
from edgetune.models.heads import unwrapped
from edgetune.quantisation.precision import Precision
from edgetune.recipe.read import recipe_from_dict
from edgetune.training import run_recipe

HELD_OUT, VALIDATION_ROWS, FAR_ROWS, ANSWERED = 10, 5, 400, 0.95
SHIPPED = ("accuracy", "answered", "accuracy_answered", "expected_calibration_error")
Row = dict[str, Any]
Array = NDArray[np.float64]


def rows_of(name: str) -> list[Row]:
    """The rows of a packed file of the data sets."""
    with gzip.open(Path(os.environ["EDGETUNE_DATASETS"]) / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def split(seed: int, shots: int) -> dict[str, list[Row]]:
    """Rows to train on, to validate, and to measure: of known labels, near and far."""
    draw, test = random.Random(seed), rows_of("banking77/test.jsonl.gz")
    unknown = set(draw.sample(sorted({row["label"] for row in test}), HELD_OUT))
    train = [
        row
        for row in rows_of(f"banking77/train_{shots}shot.jsonl.gz")
        if row["label"] not in unknown
    ]
    learned, left = {_plain(row["text"]) for row in train}, dict[str, list[Row]]()
    for row in rows_of("banking77/train.jsonl.gz"):
        if row["label"] not in unknown and _plain(row["text"]) not in learned:
            left.setdefault(row["label"], []).append(row)
    speaker, messages = (
        draw.sample([_text(row) for row in rows_of(name)], FAR_ROWS)
        for name in ("snips_slots/dev.jsonl.gz", "sms_spam/dev.jsonl.gz")
    )
    return {
        "train": train,
        "validation": [
            row for label in sorted(left) for row in draw.sample(left[label], VALIDATION_ROWS)
        ],
        "known": [row for row in test if row["label"] not in unknown],
        "near": [{**row, "label": ""} for row in test if row["label"] in unknown],
        "far": [{"text": text, "label": ""} for text in speaker + messages],
    }


def _plain(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _text(row: Row) -> str:
    return str(row.get("text") or " ".join(row["tokens"]))


def read(answers: TorchAnswers, rows: list[Row]) -> tuple[Array, Array]:
    """Logits (rows, labels) and what the head reads (rows, hidden)."""
    model, logits, states = unwrapped(answers.model), [], []
    with torch.no_grad():
        for at in range(0, len(rows), 64):
            batch = answers.tokenizer(
                [row["text"] for row in rows[at : at + 64]],
                padding=True,
                truncation=True,
                max_length=128,
                return_tensors="pt",
            )
            features = model.features(batch["input_ids"], batch["attention_mask"])
            states.append(features.double().numpy())
            logits.append(model.logits_of(features).double().numpy())
    return np.concatenate(logits), np.concatenate(states)


def unit(states: Array) -> Array:
    """Each row at length 1."""
    return np.asarray(states / np.linalg.norm(states, axis=1, keepdims=True))


def scores(
    train: Array, labels: Array, temperature: float
) -> dict[str, Callable[[Array, Array], Array]]:
    """Name → (logits, states) → a score a row, higher for rows of known labels."""
    means = np.stack([train[labels == label].mean(0) for label in np.unique(labels)])
    places = np.searchsorted(np.unique(labels), labels)
    within = np.cov((train - means[places]).T)
    within += 1e-3 * np.trace(within) / len(within) * np.eye(len(within))
    inverse = np.linalg.inv(within)

    def mahalanobis(_: Array, states: Array) -> Array:
        rows = [np.einsum("ij,jk,ik->i", d, inverse, d) for d in (states - m for m in means)]
        return -np.min(rows, axis=0)

    return {
        "max probability": lambda logits, _: softmax(logits / temperature, axis=1).max(1),
        "max logit": lambda logits, _: logits.max(1),
        "energy": lambda logits, _: logsumexp(logits, axis=1),
        "cosine to class mean": lambda _, states: (unit(states) @ unit(means).T).max(1),
        "cosine to nearest row": lambda _, states: (unit(states) @ unit(train).T).max(1),
        "Mahalanobis": mahalanobis,
    }


def write(path: Path, rows: list[Row]) -> Path:
    """The rows as a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train_one(seed: int, epochs: int, data: dict[str, list[Row]], folder: Path) -> Path:
    """A run as a user would train it."""
    stage = {
        "method": "sequence-classification",
        "epochs": epochs,
        "batch_size": 32,
        "learning_rate": 5e-4,
        "head_learning_rate": 1e-3,
        "max_length": 128,
        "data": {
            "train": str(write(folder / "train.jsonl", data["train"])),
            "validation": str(write(folder / "validation.jsonl", data["validation"])),
            "label_names": True,
        },
    }
    recipe = recipe_from_dict(
        {
            "base": "builtin:minilm-l6",
            "seed": seed,
            "confidence": {"answered": ANSWERED},
            "stage": [stage],
        }
    )
    run_recipe(recipe, out=folder / "run")
    return folder / "run"


def one_seed(seed: int, shots: int, epochs: int, precisions: list[str]) -> dict[str, Any]:
    """Everything that one seed gives, printed on the way."""
    data = split(seed, shots)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = train_one(seed, epochs, data, folder)
        answers = TorchAnswers.open(run)
        labels = list(answers.labels or ())
        found = {part: read(answers, data[part]) for part in data}
        known = np.array([labels.index(row["label"]) for row in data["known"]])
        result: dict[str, Any] = {"seed": seed, "temperature": answers.confidence.temperature}
        logits = found["known"][0]
        for what, temperature in (("before", 1.0), ("after", answers.confidence.temperature)):
            p = softmax(logits / temperature, axis=1)
            bins = reliability(p.max(1), p.argmax(1) == known)
            result[f"calibration_error_{what}"] = calibration_error(bins)
        result["accuracy"] = float((logits.argmax(1) == known).mean())
        print(json.dumps(result))
        trained = np.array([labels.index(row["label"]) for row in data["train"]])
        for score, of in scores(found["train"][1], trained, answers.confidence.temperature).items():
            inside, near, far = (of(*found[part]) for part in ("known", "near", "far"))
            least = np.quantile(inside, 1 - ANSWERED)
            area = roc_auc_score(
                [1] * len(inside) + [0] * len(near), np.concatenate([inside, near])
            )
            result[score] = {
                "near": float((near < least).mean()),
                "far": float((far < least).mean()),
                "auroc_near": float(area),
            }
            print(f"{score:22} near {result[score]['near']:.3f}  far {result[score]['far']:.3f}")
        result["shipped"] = shipped(run, data, folder, precisions)
    return result


def shipped(
    run: Path, data: dict[str, list[Row]], folder: Path, precisions: list[str]
) -> dict[str, Any]:
    """What `edgetune eval` says of the run and of its bundles."""
    places, traced = {"torch": run}, Traced()
    for precision in precisions:
        for name, keep in ((f"{precision} as trained", True), (precision, False)):
            places[name] = folder / name
            export_bundle(
                [("intents", run)],
                places[name],
                precision=Precision(precision),
                task=TaskPlan(allowed_by="--allow-metric-loss", keep_confidence=keep),
                traced=traced,
            )
    file = write(folder / "test.jsonl", data["known"] + data["near"] + data["far"])
    ends = np.cumsum([0, len(data["known"]), len(data["near"]), len(data["far"])])
    found: dict[str, Any] = {}
    rejected: dict[str, NDArray[np.bool_]] = {}
    for name, place in places.items():
        result = evaluate(place, file)
        by_line = {one["line"]: bool(one.get("rejected")) for one in result.predictions}
        rejected[name] = np.array([by_line[line] for line in range(1, len(by_line) + 1)])
        found[name] = {
            "recall_near": float(rejected[name][ends[1] : ends[2]].mean()),
            "recall_far": float(rejected[name][ends[2] : ends[3]].mean()),
            **{metric: result.metrics[metric] for metric in SHIPPED},
            "changed_rejections": float((rejected[name] != rejected["torch"]).mean()),
        }
        print(name, json.dumps({key: round(value, 4) for key, value in found[name].items()}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shots", type=int, choices=(5, 10), default=10)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--precision", nargs="*", default=["int8", "int4"])
    given = parser.parse_args()
    found = [one_seed(seed, given.shots, given.epochs, given.precision) for seed in given.seeds]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
