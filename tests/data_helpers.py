"""Rows → the examples of a stage, through a file and the loader of the method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgetune.core.tasks import MethodName
from edgetune.data.batching import IGNORE
from edgetune.data.examples import ExampleSet
from edgetune.data.loaders import load_examples
from edgetune.models.load import load_tokenizer
from edgetune.models.resolve import resolve_base
from edgetune.recipe.schema import Data, Stage

Load = Callable[..., ExampleSet]


def loader(folder: Path, tmp_path: Path, method: MethodName, **settings: Any) -> Load:
    """A function that loads rows (or the file `train`) as a stage of this method would."""
    base = resolve_base(str(folder))
    tokenizer = load_tokenizer(base)

    def write(name: str, rows: list[Any]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def load(
        rows: list[Any] | None,
        *,
        train: str | None = None,
        validation: list[Any] | None = None,
        seed: int = 0,
        **data: Any,
    ) -> ExampleSet:
        held_out = None if validation is None else write("dev.jsonl", validation)
        path = train if rows is None else write("train.jsonl", rows)
        source = Data(train=path or "", validation=held_out, **data)
        stage = Stage(method=method, data=source, **settings)
        return load_examples(stage, tokenizer, base, seed=seed)

    return load


def learned_text(folder: Path, loaded: ExampleSet) -> str:
    """What the first example has loss on."""
    labels: Any = loaded.train[0].labels
    tokenizer = load_tokenizer(resolve_base(str(folder)))
    text: str = tokenizer.decode([label for label in labels if label != IGNORE])
    return text
