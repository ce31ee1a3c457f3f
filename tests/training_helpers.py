"""Small recipes, data files and batches for the tests of training."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgetune.adapters import adapt
from edgetune.bases import Base, load_body, load_tokenizer, open_folder
from edgetune.batching import Batch, collate
from edgetune.examples import load_examples
from edgetune.heads import SequenceClassifier
from edgetune.progress import Progress
from edgetune.recipe import Parameters, Recipe, Stage, recipe_from_dict

ROOMS = ("kitchen", "hall", "garden", "bedroom")
INTENTS = {"lights": "turn on the lights in the {}", "heat": "make the {} warmer, please", "music": "play a song in the {}"}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def intent_rows() -> list[dict[str, str]]:
    return [{"text": text.format(room), "label": label} for room in ROOMS for label, text in INTENTS.items()]


def action_rows() -> list[dict[str, str]]:
    return [
        {"prompt": text.format(room), "completion": json.dumps({"intent": label, "room": room})}
        for room in ROOMS
        for label, text in INTENTS.items()
    ]


def sft_recipe(base: Path, folder: Path, **stage: Any) -> Recipe:
    """Two epochs over 12 rows, validated on the first four of them."""
    train = write_rows(folder / "actions.jsonl", action_rows())
    held_out = write_rows(folder / "actions-dev.jsonl", action_rows()[:4])
    return recipe(base, "sft", train, held_out, **stage)


def intent_recipe(base: Path, folder: Path, **stage: Any) -> Recipe:
    train = write_rows(folder / "intents.jsonl", intent_rows())
    held_out = write_rows(folder / "intents-dev.jsonl", intent_rows()[:4])
    return recipe(base, "sequence-classification", train, held_out, **stage)


def recipe(base: Path, method: str, train: Path, held_out: Path | None, **stage: Any) -> Recipe:
    parameters = stage.pop("parameters", {})
    settings = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "max_length": 128, "precision": "fp32", **stage}
    data = {"train": str(train)} | ({"validation": str(held_out)} if held_out else {})
    values = {"base": str(base), "parameters": parameters, "stage": [{"method": method, "data": data, **settings}]}
    return recipe_from_dict({**values, "threads": 1})


def silent() -> Progress:
    return Progress(io.StringIO())


def decoder_batch(base_folder: Path, folder: Path) -> tuple[Any, Batch]:
    """The tiny decoder and one right-padded batch of rows of different lengths."""
    base = open_folder(base_folder, name="tiny")
    return load_body(base), _batch(base, sft_recipe(base_folder, folder).stage[0])


def adapted_decoder(base_folder: Path, folder: Path, **settings: Any) -> tuple[Any, Batch]:
    """The tiny decoder with an adapter of rank 4 that changes its answers, and a batch."""
    model, batch = decoder_batch(base_folder, folder)
    torch.manual_seed(0)
    model = adapt(model, parameters(rank=4, **settings), task="text-generation")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model, batch


def classifier_batch(base_folder: Path, folder: Path) -> tuple[SequenceClassifier, Batch]:
    base = open_folder(base_folder, name="tiny")
    torch.manual_seed(0)
    model = SequenceClassifier(load_body(base), labels=3, pooling="mean").eval()
    return model, _batch(base, intent_recipe(base_folder, folder).stage[0])


def _batch(base: Base, stage: Stage) -> Batch:
    tokenizer = load_tokenizer(base)
    return collate(load_examples(stage, tokenizer, base).train[:6], tokenizer.pad_token_id)


def parameters(**settings: Any) -> Parameters:
    return Parameters(**settings)
