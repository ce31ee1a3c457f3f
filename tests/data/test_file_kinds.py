"""Files as people have them: each kind is read without a converter, and it is said what it was
taken for.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from edgetune.core.errors import DataError, RecipeError
from edgetune.data.rows import read_rows
from edgetune.recipe.read import recipe_from_dict

ROWS = [{"text": "good, film", "label": "pos"}, {"text": "bad", "label": "neg"}]
WITH_INDEX = ',text,label\n0,"good, film",pos\n1,bad,neg\n'
KINDS: dict[str, tuple[str, str | bytes, str]] = {
    "semicolons": ("a.csv", "text;label\ngood, film;pos\nbad;neg\n", "CSV, semicolons between"),
    "quoted semicolons": ("a.csv", 'text;label\n"good, film";pos\nbad;neg\n', "semicolons"),
    "tabs in csv": ("a.csv", "text\tlabel\ngood, film\tpos\nbad\tneg\n", "CSV, tabs between"),
    "bars": ("a.csv", "text|label\ngood, film|pos\nbad|neg\n", "CSV, bars between"),
    "commas in tsv": ("a.tsv", 'text,label\n"good, film",pos\nbad,neg\n', "TSV, commas between"),
    "Excel's sep": ("a.csv", "sep=;\r\ntext;label\r\ngood, film;pos\r\nbad;neg\r\n", "CSV"),
    "spaces after commas": ("a.csv", 'text, label\n"good, film", pos\nbad, neg\n', "CSV"),
    "index": ("a.csv", WITH_INDEX, "CSV, a first column without a name left out"),
    "trailing commas": ("a.csv", 'text,label,\n"good, film",pos,\nbad,neg\n', "CSV"),
    "quotes as characters": ("a.tsv", "text\tlabel\ngood, film\tpos\nbad\tneg\n", "TSV"),
    "array": ("a.json", json.dumps(ROWS, indent=1), r"JSON \(an array\)"),
    "array in jsonl": ("a.jsonl", json.dumps(ROWS), r"JSON \(an array\)"),
    "array of an object": (
        "a.json",
        json.dumps({"version": 1, "data": ROWS}),
        r'JSON \(the array "data"\)',
    ),
    "lines in json": ("a.json", "\n".join(map(json.dumps, ROWS)), "JSON Lines"),
    "columns": (
        "a.json",
        json.dumps({key: {str(at): row[key] for at, row in enumerate(ROWS)} for key in ROWS[0]}),
        r"JSON \(columns\)",
    ),
    "UTF-16": ("a.csv", 'text,label\n"good, film",pos\nbad,neg\n'.encode("utf-16"), "utf-16"),
}


@pytest.mark.parametrize(("name", "content", "said"), KINDS.values(), ids=KINDS)
def test_a_file_is_read_as_what_it_is(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    read = read_rows(path)
    assert [row.values for row in read.rows] == ROWS
    (note,) = read.notes
    assert re.search(said, note)


def test_quotes_that_do_not_match_are_characters_between_tabs(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"Yes" he said\tpos\n6" nails\tneg\n')
    read = read_rows(tmp_path / "a.tsv")
    assert [row.values["text"] for row in read.rows] == ['"Yes" he said', '6" nails']
    assert "quotes taken as characters" in read.notes[0]


def test_a_quoted_line_break_is_no_stray_quote(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"Dear all,\nthanks",pos\n"so, so\nbad",neg\n')
    assert [row.values["text"] for row in read_rows(tmp_path / "a.csv").rows] == [
        "Dear all,\nthanks",
        "so, so\nbad",
    ]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Das ist ein schöner Film über Mädchen und Größe, für Fußgänger."),
        ("cp1251", "Это очень хороший фильм, и я советую его посмотреть всем друзьям."),
        ("shift_jis", "これはとても良い映画です。友達にも勧めたいと思います。"),
    ],
)
def test_an_encoding_is_guessed_and_said_or_set(tmp_path: Path, encoding: str, text: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"text;label\n{text};pos\n{text};neg\n".encode(encoding))
    guessed = read_rows(path)
    assert guessed.rows[0].values["text"] == text
    assert "(a guess; data.encoding sets it)" in guessed.notes[0]
    stated = read_rows(path, encoding=encoding)
    assert (stated.rows, "guess" in stated.notes[0]) == (guessed.rows, False)
    with pytest.raises(DataError, match=r"data\.encoding is not known"):
        read_rows(path, encoding="cp99999")


def test_content_tells_what_the_ending_does_not(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "a.csv")
    read = read_rows(tmp_path / "a.csv")
    assert [row.values for row in read.rows] == ROWS
    assert read.notes == ["Parquet, though it is named .csv"]


def test_zstandard_is_unpacked(tmp_path: Path) -> None:
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    with pyarrow.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as stream:
        stream.write(content)
    assert [row.values for row in read_rows(tmp_path / "a.jsonl.zst").rows] == ROWS


def test_names_of_classes_come_from_hugging_faces_schema(tmp_path: Path) -> None:
    import datasets

    classes = datasets.ClassLabel(names=["O", "B-PER"])
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": classes, "tags": datasets.List(classes)}
    )
    rows = [{"text": "a", "label": 1, "tags": [0, 1]}, {"text": "b", "label": -1, "tags": []}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    read = read_rows(tmp_path / "a.parquet")
    assert [row.values["label"] for row in read.rows] == ["B-PER", None]
    assert read.rows[0].values["tags"] == ["O", "B-PER"]
    assert "names of the classes of label, tags" in read.notes[0]


def test_several_files_are_one_source_whose_rows_name_their_file(tmp_path: Path) -> None:
    for name, row in zip(("a", "b"), ROWS, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for source in (files, tmp_path, tmp_path / "*.jsonl"):
        read = read_rows(source)
        assert [row.values for row in read.rows] == ROWS
        assert len({row.line for row in read.rows}) == 2
        assert f"line {read.rows[1].line}" == "line 1 of b.jsonl"
        assert read.notes == ["2 files: JSON Lines"]
    assert read_rows(files).digest != read_rows(files[::-1]).digest


def test_a_folder_of_several_splits_is_refused(tmp_path: Path) -> None:
    for name in ("train-00000.jsonl", "test-00000.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROWS[0]))
    with pytest.raises(DataError, match=r"holds several splits .*/train\*"):
        read_rows(tmp_path)
    assert len(read_rows(tmp_path / "train*").rows) == 1


def made(train: Any, folder: Path) -> Any:
    data = {"train": train}
    values = {"base": "b", "stage": [{"method": "causal-lm", "data": data}]}
    return recipe_from_dict(values, folder=folder).stage[0].data.train


def test_a_recipe_names_files_lists_and_hub_sets(tmp_path: Path) -> None:
    assert made(["a.jsonl", "b/*.csv"], tmp_path) == (
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "b/*.csv"),
    )
    assert made("owner/name:config:train", tmp_path) == "owner/name:config:train"
    with pytest.raises(RecipeError, match="is a URL, and those are not fetched"):
        made("https://example.com/train.jsonl", tmp_path)


def workbook(path: Path, *rows: tuple[Any, ...]) -> str:
    import openpyxl

    book = openpyxl.Workbook()
    for cells in rows:
        book.active.append(cells)
    book.create_sheet("notes").append(["other"])
    book.save(path)
    return str(path)


def test_the_first_sheet_of_a_workbook_is_read(tmp_path: Path) -> None:
    rows = (None, None), ("text", "label"), ("good, film", "pos"), (None, None), ("bad", "neg")
    found = read_rows(workbook(tmp_path / "a.xlsx", *rows))
    assert [dict(row.values) for row in found.rows] == ROWS
    assert [row.line for row in found.rows] == [3, 5]
    assert found.notes == ['Excel, the first of 2 sheets, "Sheet"']


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("text", "label", "label"), r'line 1: the column "label" appears twice'),
        (("text", None, "label"), r"line 1: column 2 has no name"),
        (("Tickets of May", None, None), r"line 1: column 2 has no name .* must go"),
    ],
)
def test_columns_of_a_workbook_are_never_lost(
    names: tuple[Any, ...], message: str, tmp_path: Path
) -> None:
    path = workbook(tmp_path / "a.xlsx", names, ("good", "seen", "pos"), ("bad", "seen", "neg"))
    with pytest.raises(DataError, match=message):
        read_rows(path)
