"""What a file is taken for, and what is said where it can be nothing or something else."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from file_kinds import FORMATS, KINDS, READ_AS, each, label, text, write_format

from edgetune.core.errors import DataError
from edgetune.data.row import Row
from edgetune.data.rows import Rows, read_rows
from edgetune.inspection.reading import Reading
from edgetune.inspection.readings import readings


def read(values: list[dict[str, Any]], task: str | None = None, **given: str) -> list[Reading]:
    source = Rows("rows.csv", [Row(n, one) for n, one in enumerate(values, start=1)], 0, "", [])
    return readings(source, given, task)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_rows_is_recognised(kind: str) -> None:
    assert read(KINDS[kind])[0].task == READ_AS[kind]


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_reads_alike(ending: str, tmp_path: Path) -> None:
    path = write_format(tmp_path, ending, KINDS["one label"])
    first = readings(read_rows(path), {})[0]
    assert (first.task, dict(first.data)) == (
        "sequence-classification",
        {"text": "message", "label": "category"},
    )


def test_a_conll_file_has_tags_and_a_poem_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("Ann B-PER\nsings O\n\nBob B-PER\nis O\nhere O\n" * 9)
    assert readings(read_rows(tmp_path / "a.conll"), {})[0].task == "token-classification"
    (tmp_path / "a.txt").write_text("\n".join(f"{text(n)[14:23]}" for n in range(60)))
    assert readings(read_rows(tmp_path / "a.txt"), {})[0].task == "causal-lm"


def test_two_readings_are_both_offered_with_the_options_that_choose_them() -> None:
    stars = each(lambda n: {"review": text(n), "stars": n % 5 + 1})
    options = [one.options() for one in read(stars)]
    assert options[:2] == [
        "--task sequence-classification --text review --label stars",
        "--task regression --text review --label stars",
    ]
    assert [one.task for one in read(KINDS["preferences"])][:2] == ["dpo", "reward"]
    assert [one.task for one in read(KINDS["plain text"])][:2] == ["causal-lm", "masked-lm"]


@pytest.mark.parametrize(
    ("make", "tasks"),
    [
        (lambda n: {"question": text(n), "answer": f"It is {n}."}, ["sft", "contrastive"]),
        (
            lambda n: {"sentence1": text(n), "sentence2": f"It is {n}.", "score": n / 7},
            ["regression", "contrastive"],
        ),
        (lambda n: {"left": text(n), "right": f"All is as it was {n}."}, ["sft", "contrastive"]),
        (lambda n: {"text": text(n), "label": label(n)}, ["sequence-classification"]),
    ],
)
def test_texts_that_are_alike_are_one_of_the_readings(make: Any, tasks: list[str]) -> None:
    assert [one.task for one in read(each(make))] == tasks
    asked = read(each(make), "contrastive")[0]
    assert asked.task == "contrastive" and {*asked.data.values()} <= {*make(0)}
    assert read(each(make), **{k: str(v) for k, v in asked.data.items()})[-1].task in tasks


def test_a_pair_that_is_named_needs_no_other_column_gone() -> None:
    rows = each(lambda n: {"a": text(n), "b": f"So {n} it is.", "kind": label(n), "no": f"No {n}!"})
    assert dict(read(rows, "contrastive")[0].data) == {"text": "a", "label": "kind"}
    named = read(rows, text="a", text_pair="b", negative="no")[0]
    assert named.options() == "--task contrastive --text a --text-pair b --negative no"


def test_what_is_given_decides() -> None:
    rows = each(
        lambda n: {"title": text(n), "body": text(n + 5), "a b": label(n), "kind": "xy"[n % 2]}
    )
    assert dict(read(rows, label="a b", text="title")[0].data) == {"text": "title", "label": "a b"}
    pair = read(rows, text="title", text_pair="body", label="kind")[0]
    assert dict(pair.data) == {"text": "title", "text_pair": "body", "label": "kind"}
    sft = read(rows, prompt="title", completion="body")[0]
    assert (sft.task, dict(sft.data)) == ("sft", {"prompt": "title", "completion": "body"})
    assert read(rows, "masked-lm")[0].task == "masked-lm"


def test_many_numbers_in_a_row_are_classes_and_others_are_measured() -> None:
    rows = each(lambda n: {"text": text(n), "label": n % 30, "weight": 3 * (n % 30)})
    assert [one.task for one in read(rows, label="label")] == [
        "sequence-classification",
        "regression",
    ]
    assert read(rows, label="weight")[0].task == "regression"


NUMBERS: dict[str, Any] = {
    "decimal comma": lambda n: f"{n % 40},{n % 7}",
    "money": lambda n: f"1.2{n % 99:02},50 €",
    "a few are none": lambda n: f"{n}.5" if n % 20 else "n/a",
    "all different, of several lengths": lambda n: (n * 7919) % 99991,
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_are_measured_however_they_are_written(kind: str) -> None:
    rows = each(lambda n: {"Beschreibung": text(n), "Preis": NUMBERS[kind](n)})
    first = read(rows)[0]
    assert first.options() == "--task regression --text Beschreibung --label Preis"
    assert read(rows, "regression", label="Preis")[0] == first


@pytest.mark.parametrize(
    "value",
    [
        lambda n: f"{n % 28 + 1:02}.03.2024",
        lambda n: f"2024-03-{n % 28 + 1:02} 10:00",
        lambda n: 10001 + (n * 37) % 500,
        lambda n: 3 * n,
    ],
)
def test_dates_and_counted_rows_are_no_labels(value: Any) -> None:
    rows = each(lambda n: {"Nachricht": text(n), "Spalte": value(n)})
    assert {one.task for one in read(rows)} == {"causal-lm", "masked-lm"}


CELLS = {
    "JSON": '["cold", "water"]',
    "Python": "['cold', 'water']",
    "numpy": "['cold' 'water']",
    "commas": "cold,water",
}


@pytest.mark.parametrize("kind", CELLS)
def test_labels_in_cells_are_as_many_as_are_learned(kind: str) -> None:
    named = [*itertools.combinations(("cold", "water", "heat", "noise"), 2)]
    cells = [CELLS[kind].replace("cold", a).replace("water", b) for a, b in named]
    first = read(each(lambda n: {"text": text(n), "labels": cells[n % 6]}))[0]
    assert first.task == "multi-label" and "some of 4 labels" in first.what


TAGS = {
    "JSON": ('["Ann", "sings"]', '["B-PER", "O"]'),
    "Python": ("['Ann', \"it's\"]", "['B-PER', 'O']"),
    "numpy": ("['Ann' 'sings']", "['B-PER' 'O']"),
    "numbers": ("['Ann' 'sings']", "[1 0]"),
    "spaces": ("Ann sings", "B-PER O"),
}


@pytest.mark.parametrize("kind", TAGS)
def test_words_and_tags_may_be_spelled_in_cells(kind: str) -> None:
    words, tags = TAGS[kind]
    rows = each(lambda n: {"tokens": words, "ner_tags": tags if n else "one too many"})
    assert read(rows)[0].options() == "--task token-classification --tokens tokens --tags ner_tags"


def test_what_is_called_a_label_may_be_long_and_may_be_several_numbers() -> None:
    long = [f"a question on the {one} of a customer in Europe" for one in ("bill", "parcel")]
    assert read(each(lambda n: {"text": text(n), "label": long[n % 2]}))[0].task == (
        "sequence-classification"
    )
    several = ("1", "2", "1,2", "2,3", "3", "1,3")
    first = read(each(lambda n: {"text": text(n), "labels": several[n % 6]}))[0]
    assert first.task == "multi-label" and "some of 3 labels" in first.what


def test_a_text_that_is_like_another_is_no_label() -> None:
    rows = each(lambda n: {"anchor": text(n), "positive": label(n) + " it is", "negative": "so so"})
    assert read(rows)[0].task == "contrastive"


def test_long_texts_that_repeat_are_asked_and_answered() -> None:
    rows = each(lambda n: {"mr": text(n // 8) + " with all that is in it", "ref": f"It is {n}, so"})
    assert read(rows)[0].options() == "--task sft --prompt mr --completion ref"


def test_numbers_that_name_classes_have_names_in_another_column() -> None:
    rows = each(lambda n: {"text": text(n), "label": n % 3, "label_text": label(n)})
    found = [dict(one.data)["label"] for one in read(rows) if one.task == READ_AS["one label"]]
    assert found == ["label", "label_text"]


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        (
            each(lambda n: {"uid": f"u{n}", "text": text(n), "topic": label(n)}),
            {"label": "uid"},
            r'"uid" is no label: it has another value in every row .*repeat: topic \(3\)\)\.'
            r" Name it with --label topic",
        ),
        (
            each(lambda n: {"text": text(n), "topic": "same"}),
            {"label": "topic"},
            "is no label: it has the same value in every row",
        ),
        (
            each(lambda n: {"text": text(n), "topic": label(n)}),
            {"label": "topics"},
            r'there is no column "topics".*Did you mean "topic"',
        ),
        (
            each(lambda n: {"text": text(n), "label": "same"}),
            {},
            '"label" is no label: it has the same value in every row',
        ),
        (
            each(lambda n: {"width": n, "height": n * 2}),
            {},
            r"there is no column of text .*got the columns width \(numbers\), height \(numbers\)",
        ),
        (
            each(lambda n: {"text": text(n)}),
            {"chosen": "text"},
            "nothing fits --chosen text",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(
    values: list[dict[str, Any]], given: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(values, **given)
