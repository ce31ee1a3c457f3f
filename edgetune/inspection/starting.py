"""A data file → a recipe that trains as it stands, with comments."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgetune.core.errors import DataError
from edgetune.core.settings import toml_value
from edgetune.core.tasks import METHODS
from edgetune.core.templates import column_reference
from edgetune.data.alike import equal_key
from edgetune.data.examples import token_limit
from edgetune.data.findings import Finding
from edgetune.data.rows import read_rows
from edgetune.data.sources import SPLIT
from edgetune.data.splits import ENOUGH
from edgetune.inspection import fitting
from edgetune.inspection.fitting import Setting, Size
from edgetune.inspection.overview import WHOLE, Overview, look_at
from edgetune.inspection.reading import Given, Reading
from edgetune.inspection.readings import parses, readings
from edgetune.models.load import hidden_size, load_tokenizer
from edgetune.models.resolve import resolve_base
from edgetune.recipe.paths import file_format, is_hub_id
from edgetune.recipe.read import parse_toml, recipe_from_dict
from edgetune.recipe.schema import Recipe, Stage
from edgetune.training.inputs import read_inputs

ENCODER, DECODER = "builtin:minilm-l6", "builtin:smollm2-135m-instruct"
ABOUT = {ENCODER: "a sentence encoder of 23M parameters", DECODER: "135M parameters"}
SCALE = 20  # numbers beyond it are divided, as the learning rate expects 1 to 10
LATIN, FOREIGN = "\u024f", 0.2  # the last of Latin's letters; the share of others that is said
FEW_LINES, ALL_BUT = 20, 0.9  # of a document, of which so many have to look like rows
UNEVEN = 10  # times as many rows of one label as of another
COLUMN = 34  # where comments begin


@dataclass(frozen=True)
class Draft:
    """A recipe and what it was made from."""

    text: str
    recipe: Recipe
    reading: Reading
    others: Sequence[Reading]  # that the file could be read as, too
    overview: Overview  # of the rows, none cut
    findings: Sequence[Finding]  # as the recipe reads them
    held_out: int
    note: str = ""  # what the built-in base is not made for, or the rows seem to be


def sources_of(data: str, validation: str | None) -> tuple[str | tuple[str, ...], str | None]:
    """What to train on and to measure on: a folder with files of several splits is both."""
    folder = Path(data)
    if not folder.is_dir():
        return data, validation
    splits: dict[str, list[str]] = {}
    for one in sorted(folder.iterdir()):
        said = SPLIT.match(one.name)
        if said and one.is_file() and file_format(one):
            splits.setdefault(said[1].lower(), []).append(str(one))
    if len(splits) < 2 or "train" not in splits:
        return data, validation
    held = next((s for s in ("validation", "valid", "val", "dev", "eval") if s in splits), "test")
    train = splits["train"]
    measured = validation or (splits[held][0] if held in splits else None)
    return train[0] if len(train) == 1 else tuple(train), measured


def recipe_path(data: str) -> Path:
    """Where the recipe of a data file goes: beside it, under its name."""
    if is_hub_id(data) and not Path(data).exists():
        return Path(re.split(r"[@:]", data.rpartition("/")[2])[0] + ".toml")
    path = Path(data)
    if path.name in ("", ".."):  # the current folder, or one above it
        path = path.resolve()
    name = re.sub(r"[*?\[\]]+", "", path.name.partition(".")[0]).strip("-_ ")
    return path.parent / f"{name or 'recipe'}.toml"


def choices(
    data: str | tuple[str, ...], given: Given, task: str | None, base: str | None
) -> list[Reading]:
    """The readings of a file, those first that fit the base where one is named."""
    rows = read_rows(data, skip_invalid=True)
    found = readings(rows, given, task)
    if base is None:
        return found
    kind = resolve_base(base).kind
    fitting_base = [one for one in found if kind in METHODS[one.method].kinds]
    return fitting_base or found


def draft(
    reading: Reading,
    others: Sequence[Reading],
    data: str | tuple[str, ...],
    validation: str | None,
    *,
    path: Path,
    base: str | None = None,
) -> Draft:
    """The recipe of a reading, read back and its rows loaded, so that it trains as it stands.

    Raises what a training would: the errors of data and base.
    """
    name = base or (ENCODER if METHODS[reading.method].kinds[0] == "encoder" else DECODER)
    found = resolve_base(name)
    tokenizer = load_tokenizer(found)
    rows = _data(reading, data, validation, path.parent)
    first = _recipe({"base": name, "stage": [_stage(reading, rows, max_length=WHOLE)]}, path)
    overview = look_at(first.stage[0], tokenizer, found, seed=first.seed)
    reading = replace(reading, what=_counted(reading, overview))
    size = Size(
        rows=overview.rows["train"],
        examples=overview.examples,
        labels=len(overview.labels),
        lengths=[one.tokens for of in overview.lengths.values() for one in of],
        hidden=hidden_size(found),
        positions=token_limit(WHOLE, tokenizer, found),
    )
    if _names_too(reading, size, overview):
        size = replace(size, examples=size.examples + size.labels)
    held_out = 0
    if validation is None:
        held_out = overview.rows.get("validation", 0) + overview.unusable.get("validation", 0)
    text = _text(
        reading, rows, overview, size, held_out, stage=first.stage[0], path=path, base=name
    )
    for whole in (text + _schema(reading, overview), text):
        recipe = _recipe(parse_toml(whole, where=str(path)), path)
        try:
            inputs = read_inputs(recipe)
        except DataError:
            if whole == text:
                raise
            continue  # answers that are JSON of no one form
        break
    findings, note = inputs.sets[0].findings, "" if base else _foreign(overview)
    note = _rows_in_text(reading, overview) or note
    return Draft(whole, recipe, reading, others, overview, findings, held_out, note)


def _rows_in_text(reading: Reading, overview: Overview) -> str:
    """A line where a document seems to be a table or fastText's, a row a line; "" for others."""
    texts = overview.texts["train"]
    lines = texts[0].asked.splitlines()[:1000] if len(texts) == 1 else []
    if reading.method not in ("causal-lm", "masked-lm") or len(lines) < FEW_LINES:
        return ""
    tabs = Counter(line.count("\t") for line in lines).most_common(1)[0]
    labels = sum(line.startswith("__label__") for line in lines)
    if max(labels, tabs[1] if tabs[0] else 0) < ALL_BUT * len(lines):
        return ""
    return (
        "read as one document, and its lines look like rows: for a label each, save them as .tsv"
        " with a first line of names, such as label and text"
    )


def _counted(reading: Reading, overview: Overview) -> str:
    """What the reading says, with the number of labels that all rows have as they are learned."""
    found = len(
        {equal_key(name) for name in overview.labels} if _alike(overview) else overview.labels
    )
    return re.sub(r"(one|some) of \d+ labels", rf"\1 of {found} labels", reading.what)


def _alike(overview: Overview) -> bool:
    """Whether labels of a classifier differ in case or spaces alone, which makes them one."""
    one_label = (overview.method, overview.problem) == ("sequence-classification", "single-label")
    return one_label and any(one.kind == "alike-labels" for one in overview.findings)


def _names_too(reading: Reading, size: Size, overview: Overview) -> bool:
    """Whether each label's name is learned as one more row of it."""
    few = fitting.few_rows_a_label(size) and reading.task == "sequence-classification"
    return few and not _alike(overview)


def _foreign(overview: Overview) -> str:
    """A line where the rows are written in letters that the built-in bases have hardly read."""
    letters = [c for row in overview.texts["train"][:1000] for c in row.asked if c.isalpha()]
    others = sum(c > LATIN for c in letters)
    if others <= FOREIGN * len(letters):
        return ""
    return (
        f"{others / len(letters):.0%} of the letters are not Latin, and the built-in base has read"
        " English: --base names one that knows these rows' language"
    )


def _schema(reading: Reading, overview: Overview) -> str:
    """`[generation]` of answers that are all JSON; "" for others, and where llguidance is not."""
    answers = [row.answered for of in overview.texts.values() for row in of]
    if reading.method != "sft" or not all(map(parses, answers)) or not find_spec("llguidance"):
        return ""
    lines = ["", "[generation]", _line(Setting("schema", "auto", "answers have the form of these"))]
    return "\n".join(lines) + "\n"


def _recipe(values: Mapping[str, Any], path: Path) -> Recipe:
    return recipe_from_dict(values, folder=path.parent, where=str(path))


def _data(
    reading: Reading, data: str | tuple[str, ...], validation: str | None, folder: Path
) -> dict[str, Any]:
    """The keys of `[stage.data]` that say which rows and columns; paths as seen from the recipe."""

    def seen(one: str) -> str:
        if is_hub_id(one) and not Path(one).exists():
            return one
        return Path(os.path.relpath(one, folder)).as_posix()

    train = seen(data) if isinstance(data, str) else [seen(one) for one in data]
    measured = {} if validation is None else {"validation": seen(validation)}
    return {"train": train, **measured, **reading.data, **_numbers(reading)}


def _numbers(reading: Reading, *, divided_by: int = 1) -> dict[str, str]:
    """The label as a template, where it is a number that is not written plainly or is too large."""
    column = reading.data.get("label")
    if not isinstance(column, str) or "{" in column or (reading.point, divided_by) == (None, 1):
        return {}
    read = "number(',')" if reading.point == "," else "number"
    scaled = "" if divided_by == 1 else f" / {divided_by}"
    return {"label": column_reference(column)[:-3] + f" | {read}{scaled} }}}}"}


def _stage(reading: Reading, data: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    problem = {} if reading.problem == "single-label" else {"problem": reading.problem}
    return {"method": reading.method, **problem, "data": dict(data), **settings}


def _text(
    reading: Reading,
    data: Mapping[str, Any],
    overview: Overview,
    size: Size,
    held_out: int,
    *,
    stage: Stage,
    path: Path,
    base: str,
) -> str:
    """The recipe as TOML with comments."""
    length = fitting.longest(reading, size)
    head = [Setting("method", reading.method, reading.what)]
    if reading.problem != "single-label":
        head.append(Setting("problem", reading.problem))
    sections = {
        "": [Setting("base", base, ABOUT.get(base, "")), Setting("out", f"runs/{path.stem}")],
        "[[stage]]": [*head, *fitting.stage_settings(stage, size), length, *_weights(overview)],
        "[stage.data]": _data_settings(reading, data, overview, size, held_out, length.value),
    }
    read = "; ".join(overview.notes.get("train", ())[:1])
    lines = [
        f"# {overview.rows['train'] + held_out:,} rows of {Path(overview.source).name}"
        + (f" ({read})" if read else ""),
        "# Every key: docs/reference/recipe.md. Train with: edgetune train " + path.name,
    ]
    for title, settings in sections.items():
        lines += ["", title] if title else []
        lines += [_line(setting) for setting in settings]
    return "\n".join(lines) + "\n"


def _weights(overview: Overview) -> list[Setting]:
    """Of labels with very different numbers of rows, what would weigh them, as a comment."""
    counts = [of["train"] for of in overview.labels.values() if of["train"]]
    if overview.method != "sequence-classification" or not counts:
        return []
    if max(counts) < UNEVEN * min(counts):
        return []
    why = f"labels have {min(counts)} to {max(counts)} rows: rare ones would count more"
    return [Setting("# class_weights", "balanced", why)]


def _data_settings(
    reading: Reading,
    data: Mapping[str, Any],
    overview: Overview,
    size: Size,
    held_out: int,
    limit: int,
) -> list[Setting]:
    measured = {"validation": "measured, not learned"}
    found = [Setting(key, value, measured.get(key, "")) for key, value in data.items()]
    if reading.task == "regression":
        found = [_scaled(one, reading, overview) if one.key == "label" else one for one in found]
    if "validation" not in data:
        why = (
            f"measured, not learned: {_drawn(reading)} on one side"
            if held_out
            else f"{size.rows} rows are too few to hold any out"
            if size.rows < ENOUGH
            else "no row can be: texts are all the same, or those of each label"
        )
        found.append(Setting("hold_out", held_out, why))
    if _alike(overview):
        found.append(Setting("normalise_labels", True, "some differ in case or spaces alone"))
    elif _names_too(reading, size, overview):
        found.append(Setting("label_names", True, "few rows a label: its name is one more"))
    unusable = sum(overview.unusable.values())
    if not fitting.can_be_cut(reading) and reading.method != "causal-lm":
        unusable += sum(length > limit for length in size.lengths)
    if unusable:
        found.append(Setting("skip_invalid", True, f"{unusable} rows cannot be used"))
    return found


def _drawn(reading: Reading) -> str:
    """How rows are held out: by what is answered, and by what is asked (`data.splits`)."""
    if reading.task == "regression":
        return "small and large numbers alike, equal texts"
    columns = METHODS[reading.method].columns
    if reading.task == "contrastive" and {"text_pair", "negative"} & set(reading.data):
        return "equal first texts"
    if {"label", "tags"} & set(columns):
        return f"each {'tag' if 'tags' in columns else 'label'} its share, equal texts"
    return "equal prompts" if "prompt" in columns else "equal texts"


def _scaled(label: Setting, reading: Reading, overview: Overview) -> Setting:
    """A label divided by a power of ten where the numbers are large."""
    numbers = [abs(float(row.answered)) for of in overview.texts.values() for row in of]
    most = max(numbers, default=0.0)
    power = 1
    while most / power > SCALE:
        power *= 10
    made = _numbers(reading, divided_by=power)
    if power == 1 or not made:
        return label
    return Setting("label", made["label"], f"numbers up to {most:g}, brought to a scale of 1 to 10")


def _line(setting: Setting) -> str:
    written = f"{setting.key} = {toml_value(setting.value)}"
    return written.ljust(COLUMN) + f" # {setting.why}" if setting.why else written


def refuse_existing(path: Path, *, force: bool) -> None:
    """DataError where the recipe is there already, so that nobody's work is overwritten."""
    if path.exists() and not force:
        raise DataError(
            "this recipe is there already",
            where=str(path),
            fix="Give another name with --out, or write over it with --force.",
        )
