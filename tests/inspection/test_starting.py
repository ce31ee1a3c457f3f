"""A recipe that `edgetune init` writes reads, trains as it stands, and fits its rows."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from file_kinds import KINDS, READ_AS, each, label, text, write_format, write_jsonl, write_table

from edgetune.core.progress import Progress
from edgetune.core.tasks import METHODS
from edgetune.inspection.fitting import Size, batch_of, longest
from edgetune.inspection.reading import TASKS, Reading
from edgetune.inspection.starting import Draft, _foreign, choices, draft, recipe_path, sources_of
from edgetune.recipe.read import load_recipe
from edgetune.training import run_recipe

Bases = tuple[Path, Path]


@pytest.fixture
def bases(tiny_encoder: Path, tiny_decoder: Path) -> Bases:
    return tiny_encoder, tiny_decoder


def begin(data: Path, bases: Bases, task: str | None = None, **given: str) -> Draft:
    train, validation = sources_of(str(data), None)
    first, *others = choices(train, given, task, None)
    kind = METHODS[first.method].kinds[0]
    base = bases[0] if kind == "encoder" else bases[1]
    return draft(first, others, train, validation, path=recipe_path(str(data)), base=str(base))


def trained(made: Draft, path: Path, out: Path) -> dict[str, Any]:
    """The summary after one step of the recipe as it was written."""
    path.write_text(made.text, encoding="utf-8")
    recipe = load_recipe(path, ["stage.0.max_steps=1", "stage.0.precision=fp32", "threads=1"])
    summary = run_recipe(recipe, out=out, progress=Progress(io.StringIO()))
    return dataclasses.asdict(summary)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_rows_gives_a_recipe_that_trains(
    kind: str, bases: Bases, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", KINDS[kind])
    made = begin(path, bases)
    assert made.reading.task == READ_AS[kind]
    (data,) = trained(made, tmp_path / "rows.toml", tmp_path / "run")["data"]
    assert data["held_out"] == made.held_out >= 19 and not any(data["skipped"].values())
    assert not any(data["truncated"].values())


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("reward", "preferences"),
        ("masked-lm", "plain text"),
        ("contrastive", "one label"),
        ("contrastive", "questions"),
    ],
)
def test_the_other_readings_train_too(task: str, kind: str, bases: Bases, tmp_path: Path) -> None:
    made = begin(write_jsonl(tmp_path / "rows.jsonl", KINDS[kind]), bases, task)
    assert trained(made, tmp_path / "rows.toml", tmp_path / "run")["data"][0]["held_out"]


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".xlsx"])
def test_tables_of_every_format_train(ending: str, bases: Bases, tmp_path: Path) -> None:
    made = begin(write_format(tmp_path, ending, KINDS["one label"]), bases)
    assert f'train = "rows{ending}"' in made.text
    assert (
        trained(made, tmp_path / "rows.toml", tmp_path / "run")["data"][0]["rows"]["train"] == 100
    )


def test_the_tasks_of_the_command_line_are_all_that_rows_can_be_read_as() -> None:
    from edgetune.cli.init import TASKS as OFFERED

    assert {*OFFERED} == {*TASKS}


def test_a_recipe_says_why(bases: Bases, tmp_path: Path) -> None:
    rows = each(lambda n: {"a text": text(n), "how much": 40 * n + 0.5})
    made = begin(write_table(tmp_path / "rows.csv", rows, ","), bases)
    assert 'label = "{{ row[\\"how much\\"] | number / 1000 }}" # numbers up to 4760.5' in made.text
    assert "hold_out = 20" in made.text and "120 rows of rows.csv (CSV)" in made.text


def test_rows_that_cannot_be_used_are_left_out_and_counted(bases: Bases, tmp_path: Path) -> None:
    rows = [*KINDS["one label"], {"id": 1, "message": "", "category": "heat"}]
    made = begin(write_table(tmp_path / "rows.csv", rows, ","), bases)
    assert "skip_invalid = true" in made.text and "# 1 rows cannot be used" in made.text
    assert made.recipe.stage[0].data.skip_invalid


def test_numbers_with_a_comma_are_read_and_empty_cells_are_not_zero(
    bases: Bases, tmp_path: Path
) -> None:
    rows = each(lambda n: {"text": text(n), "Preis": f"{n},50 €" if n % 20 else ""})
    made = begin(write_table(tmp_path / "rows.csv", rows, ";"), bases)
    assert "label = \"{{ Preis | number(',') / 10 }}\"" in made.text
    assert "small and large numbers alike" in made.text and "# 6 rows cannot be used" in made.text
    numbers = [float(row.answered) for of in made.overview.texts.values() for row in of]
    assert min(numbers) == 1.5 and max(numbers) == 119.5
    summary = trained(made, tmp_path / "rows.toml", tmp_path / "run")
    assert summary["data"][0]["skipped"] == {"train": 6, "validation": 0}


def test_labels_that_differ_in_case_alone_are_made_one(bases: Bases, tmp_path: Path) -> None:
    rows = each(lambda n: {"text": text(n), "label": label(n).title() if n % 5 else label(n)})
    made = begin(write_jsonl(tmp_path / "rows.jsonl", rows), bases)
    assert "normalise_labels = true" in made.text and "one of 3 labels" in made.text
    assert made.findings == [] or all(one.kind != "alike-labels" for one in made.findings)


def test_few_rows_hold_none_out_and_many_labels_get_their_names(
    bases: Bases, tmp_path: Path
) -> None:
    rows = each(lambda n: {"text": text(n), "label": f"topic {'abcdefghijkl'[n % 12]}"}, 60)
    made = begin(write_jsonl(tmp_path / "rows.jsonl", rows), bases)
    assert "hold_out = 0" in made.text and "label_names = true" in made.text
    assert "50 steps over 72 examples" in made.text  # 60 rows, 12 names
    (data,) = trained(made, tmp_path / "rows.toml", tmp_path / "run")["data"]
    assert (data["rows"]["train"], data["examples"]) == (60, 72)


@pytest.mark.parametrize(
    ("line", "said"), [("spam\t{}", True), ("__label__spam {}", True), ("{}\n", False)]
)
def test_a_document_whose_lines_are_rows_is_told(
    line: str, said: bool, bases: Bases, tmp_path: Path
) -> None:
    (tmp_path / "rows.txt").write_text("\n".join(line.format(text(n)) for n in range(40)))
    made = begin(tmp_path / "rows.txt", bases)
    assert made.reading.task == "causal-lm" and ("look like rows" in made.note) == said


def test_rows_with_labels_are_counted_and_not_their_pairs(bases: Bases, tmp_path: Path) -> None:
    made = begin(write_jsonl(tmp_path / "rows.jsonl", KINDS["one label"]), bases, "contrastive")
    assert made.overview.rows == {"train": 100, "validation": 20}
    assert "# 120 rows of rows.jsonl" in made.text and "over 400 examples" in made.text
    (data,) = trained(made, tmp_path / "rows.toml", tmp_path / "run")["data"]
    assert (data["rows"], data["examples"]) == ({"train": 100, "validation": 20}, 400)


def test_a_folder_of_splits_measures_on_its_own(bases: Bases, tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", KINDS["one label"])
    write_jsonl(folder / "dev.jsonl", KINDS["one label"][:30])
    write_jsonl(folder / "test.jsonl", KINDS["one label"][:30])
    made = begin(folder, bases)
    assert 'train = "shop/train.jsonl"' in made.text
    assert 'validation = "shop/dev.jsonl"' in made.text and "hold_out" not in made.text
    assert recipe_path(str(folder)) == tmp_path / "shop.toml"
    assert [one.kind for one in made.findings if one.matters] == ["validation-in-train"]


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ("a/tickets.csv", "a/tickets.toml"),
        ("tickets.jsonl.gz", "tickets.toml"),
        ("data/part-*.jsonl", "data/part.toml"),
        ("data/*.jsonl", "data/recipe.toml"),
        ("owner/some-set:train", "some-set.toml"),
    ],
)
def test_a_recipe_lies_beside_its_data(data: str, path: str) -> None:
    assert recipe_path(data) == Path(path)


def size(rows: int, *lengths: int, labels: int = 4, positions: int = 512) -> Size:
    return Size(rows, rows, labels, lengths or (20,), 384, positions)


def test_what_auto_comes_to_is_said_beside_it(bases: Bases, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", KINDS["one label"])
    made = begin(path, bases)
    assert "10 by rule: 70 steps over 100 rows" in made.text
    assert made.recipe.stage[0].epochs == made.recipe.stage[0].learning_rate == "auto"
    assert (batch_of("sft", 50_000), batch_of("sequence-classification", 50_000)) == (8, 32)


def test_json_answers_carry_their_schema_and_answers_of_no_one_form_do_not(
    bases: Bases, tmp_path: Path
) -> None:
    made = begin(write_jsonl(tmp_path / "rows.jsonl", KINDS["JSON answers"]), bases)
    assert made.recipe.generation is not None and made.recipe.generation.schema == "auto"
    prose = begin(write_jsonl(tmp_path / "prose.jsonl", KINDS["questions"]), bases)
    assert prose.recipe.generation is None


def test_letters_that_the_built_in_base_has_not_read_are_said(bases: Bases, tmp_path: Path) -> None:
    greeting = "привет, как у вас сегодня дела и что нового в этом доме"
    rows = each(lambda n: {"text": f"{greeting}: {text(n)}", "label": label(n)})
    made = begin(write_jsonl(tmp_path / "rows.jsonl", rows), bases)
    assert made.note == "" and "of the letters are not Latin" in _foreign(made.overview)
    latin = begin(write_jsonl(tmp_path / "latin.jsonl", KINDS["one label"]), bases)
    assert _foreign(latin.overview) == ""


def test_labels_of_uneven_numbers_are_told_how_to_be_weighed(bases: Bases, tmp_path: Path) -> None:
    rows = each(lambda n: {"text": text(n), "label": "rare" if n % 24 == 0 else "usual"})
    made = begin(write_jsonl(tmp_path / "rows.jsonl", rows), bases)
    assert '# class_weights = "balanced"' in made.text
    assert made.recipe.stage[0].class_weights == "none"


def test_few_long_texts_are_cut_and_no_answer_is() -> None:
    lengths = [20] * 199 + [400]
    of = size(200, *lengths)
    assert longest(Reading("sequence-classification"), of).value == 32
    assert longest(Reading("sft"), of).value == 448
    assert longest(Reading("sft"), size(200, *lengths, positions=256)).value == 256
