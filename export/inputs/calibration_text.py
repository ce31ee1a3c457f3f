"""The text that a calibrated quantiser sees: the adapters' own training rows, read as training read
them, or a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from edgetune.adapters.folder import read_metadata
from edgetune.core.errors import DataError, ExportError
from edgetune.core.layout import ADAPTER_METADATA, RECIPE
from edgetune.core.progress import Say
from edgetune.data.examples import ExampleSet
from edgetune.data.loaders import load_examples
from edgetune.data.out_of_scope import outside_label
from edgetune.data.row import Row
from edgetune.data.rows import read_rows
from edgetune.data.splits import as_run
from edgetune.export.inputs.sources import AdapterSource
from edgetune.models.base import Base
from edgetune.models.calibration import LENGTH, TOKENS, calibrate
from edgetune.models.heads import Embedder, SequenceClassifier
from edgetune.quantisation.precision import QUANTISERS, Precision
from edgetune.recipe.read import load_run_recipe

# of a file; those that a row has, one after the other
TEXT_COLUMNS = ("text", "prompt", "completion", "chosen")


def check_quantiser(
    precision: Precision, *, mode: str, calibration: Path | None, swaps: bool
) -> None:
    """ExportError for a quantiser that cannot do what is asked, before anything is loaded. `swaps`:
    whether --mode separate takes it.
    """
    name = precision.quantiser
    if name not in QUANTISERS:
        raise ExportError(
            "unknown quantiser", where="--quantiser", expected=", ".join(QUANTISERS), got=name
        )
    if name != "rtn" and "int4" not in (precision.weights, *precision.overrides.values()):
        raise ExportError(
            "it rounds 4-bit weights, and there are none",
            where=f"--quantiser {name}",
            got=f"--precision {precision.weights}",
            fix="8 bits lose nothing by rounding to nearest.",
        )
    if name == "gptq" and mode == "merged":
        raise ExportError(
            "what of merged or fully trained weights survives calibrated rounding cannot be"
            " told yet",
            where="--quantiser gptq",
            fix="Use --quantiser hqq, or --mode separate." if swaps else "Use --quantiser hqq.",
        )
    if calibration is not None and name != "gptq":
        raise ExportError("only gptq reads text", where="--calibration", got=f"--quantiser {name}")


def check_activations(precision: Precision, *, kind: str, mode: str) -> None:
    """ExportError for 8-bit activations where no product can have them, before anything is
    loaded.
    """
    if precision.activations == "float":
        return
    for what, wanted, got in (
        ("base", "encoder", kind),
        ("--precision", "int8", precision.weights),
        ("--mode", "separate", mode),
    ):
        if got != wanted:
            raise ExportError(
                "8-bit activations are for encoders in int8, with adapters as inputs",
                where="--activations int8",
                expected=f"{what} {wanted}",
                got=got,
            )


def calibrate_base(
    model: Any,
    base: Base,
    sources: Sequence[AdapterSource],
    tokenizer: Any,
    precision: Precision,
    *,
    file: Path | None,
    say: Say,
) -> None:
    """Round the 4-bit weights of `model` to the inputs that the text of `file`, or of the adapters'
    recipes, gives them.
    """
    rows = file_rows(file, tokenizer) if file is not None else recipe_rows(sources, tokenizer, base)
    limit = min(LENGTH, base.max_length)
    calibrate(
        model.body if isinstance(model, (Embedder, SequenceClassifier)) else model,
        [row[:limit] for row in rows],
        precision,
        say=say,
    )


def recipe_rows(sources: Sequence[AdapterSource], tokenizer: Any, base: Base) -> list[list[int]]:
    """Training rows of the runs, in turn from each, as token ids; about as many as `calibrate`
    takes.
    """
    found = []
    for source in sources:
        examples = run_examples(source.folder, tokenizer, base)
        if examples is not None:
            found.append(list(_evenly([list(example.input_ids) for example in examples.train])))
    if not found:
        raise ExportError(
            "gptq rounds to the inputs that a layer gets, and no run here names its data",
            where="--quantiser gptq",
            fix="Give --calibration FILE of text, or use --quantiser hqq, which needs none.",
        )
    return [row for row in chain(*zip_longest(*found)) if row]


def file_rows(file: Path, tokenizer: Any) -> list[list[int]]:
    """The texts of a data file as token ids, cut into pieces that `calibrate` takes."""
    rows = read_rows(file).rows
    texts = [_text(row, file) for row in _evenly(rows)]
    pieces = (
        ids[at : at + LENGTH]
        for ids in tokenizer(texts, verbose=False)["input_ids"]
        for at in range(0, len(ids), LENGTH)
    )
    return [list(piece) for piece in pieces if len(piece) > 1]


def _text(row: Row, file: Path) -> str:
    values = [str(row.values[name]) for name in TEXT_COLUMNS if row.values.get(name)]
    if not values:
        raise DataError(
            "this row has no text",
            where=f"{file}, line {row.line}",
            expected=f"one of the columns {', '.join(TEXT_COLUMNS)}",
            got=", ".join(row.values),
        )
    return "\n".join(values)


def _evenly(rows: Sequence[Any]) -> Iterator[Any]:
    """Rows from all over a file: neighbours are often of one class. At most one for every two
    tokens that are used.
    """
    count = min(len(rows), TOKENS // 2)
    step = next(
        (step for step in (7919, 104729, 1) if len(rows) % step), 1
    )  # a prime that walks through all of them
    return (rows[(at * step) % len(rows)] for at in range(count))


def has_recipe(sources: Sequence[AdapterSource]) -> bool:
    """Whether a recipe beside any of the adapters says what it was trained on."""
    return any((source.folder.parent / RECIPE).is_file() for source in sources)


def run_examples(adapter: Path, tokenizer: Any, base: Base) -> ExampleSet | None:
    """The examples of the last stage of the run that `adapter` lies in, with its labels, its rows
    held out by its seed.

    None where there is no recipe beside it; an EdgetuneError where its data has moved or cannot be
    read any more.
    """
    recipe_file = adapter.parent / RECIPE
    if not recipe_file.is_file():
        return None
    recipe = load_run_recipe(recipe_file)
    labels = (
        read_metadata(adapter).get("labels") if (adapter / ADAPTER_METADATA).is_file() else None
    )
    outside = outside_label(recipe)
    return load_examples(
        as_run(recipe.stage[-1]), tokenizer, base, labels, seed=recipe.seed, outside=outside
    )
