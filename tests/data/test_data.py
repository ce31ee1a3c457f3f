"""Data files: every format gives the same rows; every bad file gives file, line and what to do."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgetune.core.errors import DataError
from edgetune.data.rows import read_rows
from edgetune.recipe.paths import is_hub_id

ROWS = [{"text": "é one, two", "label": "a"}, {"text": 'say "hi"\nnow', "label": "b"}]


def write_jsonl(path: Path) -> None:
    path.write_text(
        '{"text": "é one, two", "label": "a"}\n\n{"text": "say \\"hi\\"\\nnow", "label": "b"}\n'
    )


def write_csv(path: Path) -> None:
    path.write_text(
        '\ufefftext,label\r\n"é one, two",a\r\n"say ""hi""\nnow",b\r\n',
        encoding="utf-8",
        newline="",
    )


def write_tsv(path: Path) -> None:
    path.write_text(
        'text\tlabel\né one, two\ta\n"say ""hi""\nnow"\tb\n', encoding="utf-8", newline=""
    )


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS: dict[str, Callable[[Path], None]] = {
    ".jsonl": write_jsonl,
    ".csv": write_csv,
    ".tsv": write_tsv,
    ".parquet": write_parquet,
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    if zipped:
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    read = read_rows(path)
    assert [row.values for row in read.rows] == ROWS
    assert read.skipped == 0 and read.digest.startswith("sha256:")


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    lines = {}
    for suffix in (".jsonl", ".csv"):
        WRITERS[suffix](tmp_path / f"rows{suffix}")
        lines[suffix] = [row.line for row in read_rows(tmp_path / f"rows{suffix}").rows]
    assert lines == {".jsonl": [1, 3], ".csv": [2, 3]}


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt.gz"
    path.write_bytes(gzip.compress(b"one\n\ntwo\n"))
    assert [row.values for row in read_rows(path).rows] == [{"text": "one\n\ntwo\n"}]


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "invalid json": (
        "a.jsonl",
        b'{"a": 1}\n{"a": }\n',
        r"a\.jsonl, line 2: not valid JSON at column 7.*skip_invalid",
    ),
    "not an object": (
        "a.jsonl",
        b"[1]\n",
        r"line 1: the row is not an object \(expected a JSON object.*got '\[1\]'",
    ),
    "empty": (
        "a.jsonl",
        b"",
        r"a\.jsonl: the file is empty \(expected at least one row, got 0 bytes\)",
    ),
    "blank": ("a.jsonl", b"\n \n", r"there are no rows in this file"),
    "blank text": ("a.txt", b" \n", r"there are no rows in this file"),
    "header only": ("a.csv", b"text,label\n", r"there are no rows in this file"),
    "ragged": (
        "a.csv",
        b"text,label\na,b\nc\n",
        r"line 3: wrong number of fields \(expected 2 \(text, label\), got 1\)",
    ),
    "quoting": ("a.csv", b'text,label\na,"b\n', r"damaged table"),
    "column twice": ("a.csv", b"text,text\na,b\n", r'line 1: the column "text" appears twice'),
    "column without name": ("a.tsv", b"text\t\na\tb\n", r"line 1: column 2 has no name"),
    "damaged UTF-8": (
        "a.jsonl",
        '{"a": "ééééé"}\n{"a": "é'.encode() + b'\xe9"}\n',
        r"a\.jsonl, line 2: not UTF-8 text \(got byte 0xe9\)\. Save it as UTF-8, or set data.enc",
    ),
    "no gzip": ("a.jsonl.gz", b'{"a": 1}\n', r"damaged gzip file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9], r"damaged gzip file"),
    "no parquet": ("a.parquet", b"PAR1 and more", r"not a readable Parquet file"),
    "kind": ("a.doc", b"[]", r"unknown kind of data file \(expected one of \.jsonl \.json \.csv"),
    "too many digits": (
        "a.jsonl",
        b'{"a": ' + b"9" * 5000 + b"}",
        r"line 1: a number with too many",
    ),
    "stray quote": (
        "a.csv",
        b'text,label\n"unclosed,pos\nok film,neg\nother",pos\nfine,neg\n',
        r"line 2: a quote that opens here closes 2 lines later, so that 3 lines",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_gives_one_clear_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no such data file \(got .* has train\.jsonl\)"):
        read_rows(tmp_path / "trian.jsonl")


def test_a_folder_without_data_files_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this is a folder without data files"):
        read_rows(tmp_path)


def test_skip_invalid_counts_the_rows_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nnonsense\n[]\n{"a": 2}\n')
    read = read_rows(path, skip_invalid=True)
    assert ([row.values["a"] for row in read.rows], read.skipped) == ([1, 2], 2)


def test_skip_invalid_does_not_accept_a_file_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("nonsense\n")
    with pytest.raises(
        DataError, match=r"no rows .*got 1 that cannot be read; the first: .*line 1"
    ):
        read_rows(path, skip_invalid=True)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", True),
        ("owner/name:test", True),
        ("owner/name:config:test", True),
        ("hf://datasets/owner/name@main:test", True),
        ("data/train.jsonl", False),
        ("../data/set", False),
        ("/abs/path", False),
        ("a/b/c", False),
        ("data/rows.csv.gz", False),
        ("data/rows.json", False),
    ],
)
def test_hub_ids_are_told_from_paths(source: str, expected: Any) -> None:
    assert is_hub_id(source) is expected


def test_offline_a_hub_data_set_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"cannot be loaded as a hub data set .*give a local file"
    ) as caught:
        read_rows("nobody/no-such-data")
    assert "\n" not in str(caught.value)
