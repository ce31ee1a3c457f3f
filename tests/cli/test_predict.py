"""`edgetune predict`: rows in, rows out; what is wrong with a row is one line and nothing is
written.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine
from runtime_helpers import decoder_bundle, encoder_bundle, peft_adapter

from edgetune.runtime import Runtime


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_text_is_streamed(command_line: CommandLine, tiny_decoder: Path) -> None:
    bundle = decoder_bundle(tiny_decoder)
    code, out, _ = command_line(
        "predict", bundle, "hello", "--adapter", "a", "--max-new-tokens", 6, "--threads", 2
    )
    with Runtime.open(bundle, threads=2) as runtime:
        assert (code, out) == (0, runtime.generate(["hello"], "a", max_new_tokens=6)[0].text + "\n")


def test_rows_keep_their_fields_and_order_and_choose_their_adapter(
    command_line: CommandLine, tiny_decoder: Path, tmp_path: Path
) -> None:
    rows = [
        {"id": 1, "prompt": "a much longer prompt than the others", "adapter": "a"},
        {"id": 2, "prompt": "hello", "adapter": None},
        {"id": 3, "mr": "hello", "adapter": "b"},
        {"id": 4, "question": "why?"},
        {"id": 5, "messages": [{"role": "user", "content": "hello"}], "adapter": "b"},
    ]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    bundle = decoder_bundle(tiny_decoder)
    code, _, _ = command_line(
        "predict",
        bundle,
        "--input",
        source,
        "--output",
        output,
        "--adapter",
        "a",
        "--max-new-tokens",
        5,
    )
    answered = read(output)
    assert code == 0
    assert [
        {k: v for k, v in row.items() if k not in ("completion", "finish_reason")}
        for row in answered
    ] == rows
    with Runtime.open(bundle) as runtime:
        prompts = [rows[0]["prompt"], "hello", "hello", "Ask: why?", "hello"]
        expected = runtime.generate(prompts, adapters=["a", None, "b", "a", "b"], max_new_tokens=5)
    assert [row["completion"] for row in answered] == [c.text for c in expected]


def test_a_base_that_embeds_because_nobody_chose_an_adapter_says_so(
    command_line: CommandLine, tiny_encoder: Path, tmp_path: Path
) -> None:
    bundle = encoder_bundle(tiny_encoder)
    _, out, err = command_line("predict", bundle, "lights")
    assert len(out.split()) == 64
    assert (
        err.splitlines()[-1]
        == "note: without --adapter this is the base model's embedding; adapters here: intent, mood"
    )
    source = write(tmp_path / "in.jsonl", [{"text": "lights"}, {"text": "card", "adapter": None}])
    _, _, err = command_line(
        "predict", bundle, "--input", source, "--output", tmp_path / "out.jsonl"
    )
    assert err.startswith("note: without --adapter 1 of 2 rows get the base model's embedding")
    assert command_line("predict", bundle, "lights", "--adapter", "mood")[2] == ""


def test_texts_get_label_and_score(
    command_line: CommandLine, tiny_encoder: Path, tmp_path: Path
) -> None:
    rows = [{"text": "lights"}, {"text": "card", "adapter": "mood"}, {"text": "x", "adapter": None}]
    with gzip.open(tmp_path / "in.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    output = tmp_path / "out.jsonl.gz"
    code, _, _ = command_line(
        "predict",
        encoder_bundle(tiny_encoder),
        "--input",
        tmp_path / "in.jsonl.gz",
        "--output",
        output,
        "--adapter",
        "intent",
    )
    answered = [
        json.loads(line) for line in gzip.decompress(output.read_bytes()).decode().splitlines()
    ]
    assert code == 0
    with Runtime.open(encoder_bundle(tiny_encoder), threads=1) as runtime:
        for row, adapter in zip(answered, ("intent", "mood"), strict=False):
            assert row["label"] == runtime.classify([row["text"]], adapter)[0].label
    assert len(answered[2]["embedding"]) == 64


def test_one_text_is_classified(command_line: CommandLine, tiny_encoder: Path) -> None:
    code, out, _ = command_line(
        "predict", encoder_bundle(tiny_encoder), "lights", "--adapter", "mood"
    )
    assert code == 0
    with Runtime.open(encoder_bundle(tiny_encoder), threads=1) as runtime:
        assert out.split("\t")[0] == runtime.classify(["lights"], "mood")[0].label


def test_a_peft_folder_can_be_the_adapter(
    command_line: CommandLine, tiny_decoder: Path, tmp_path: Path
) -> None:
    peft_adapter(tiny_decoder, tmp_path / "mine", seed=5)
    code, out, err = command_line(
        "predict",
        decoder_bundle(tiny_decoder),
        "x",
        "--adapter",
        tmp_path / "mine",
        "--max-new-tokens",
        3,
    )
    assert (code, bool(out)) == (0, True)
    assert "note: no edgetune_adapter.json" in err


def test_a_run_folder_is_told_where_its_adapter_is(
    command_line: CommandLine, tiny_decoder: Path, tmp_path: Path
) -> None:
    peft_adapter(tiny_decoder, tmp_path / "run" / "adapter", seed=5)
    code, _, err = command_line(
        "predict", decoder_bundle(tiny_decoder), "x", "--adapter", tmp_path / "run"
    )
    assert (
        code,
        f"Give {tmp_path / 'run' / 'adapter'}, or another PEFT adapter folder" in err,
    ) == (2, True)


def test_settings_of_generation_are_refused_where_nothing_is_generated(
    command_line: CommandLine, tiny_encoder: Path
) -> None:
    code, out, err = command_line(
        "predict",
        encoder_bundle(tiny_encoder),
        "lights",
        "--adapter",
        "mood",
        "--temperature",
        1,
        "--stop",
        "x",
    )
    assert (code, out) == (2, "")
    assert "--temperature, --stop say how a text is generated, and mood generates none" in err


def test_a_threshold_is_refused_where_no_label_is_given(
    command_line: CommandLine, tiny_encoder: Path
) -> None:
    bundle = encoder_bundle(tiny_encoder)
    code, out, err = command_line("predict", bundle, "lights", "--threshold", 1)
    assert (code, out) == (2, "") and "the base model gives no labels of texts" in err
    code, out, _ = command_line("predict", bundle, "lights", "--adapter", "mood", "--threshold", 1)
    assert code == 0 and out.startswith("(no label)")


BAD_ROWS: list[tuple[str, str]] = [
    ("{", "line 2: not valid JSON"),
    ("[1]", "line 2: the row is not an object (expected a JSON object such as"),
    (
        '{"other": 1}',
        (
            "line 2: the row has no `prompt` (expected prompt or messages or the columns question,"
            " got columns other)"
        ),
    ),
    (
        '{"prompt": 3}',
        "line 2: `prompt` has a wrong value (expected a text that is not empty, got 3)",
    ),
    ('{"prompt": ""}', "line 2: `prompt` has a wrong value"),
    ('{"messages": "hi"}', 'line 2: the column "messages" cannot be used'),
    ('{"prompt": "x", "adapter": "zz"}', "line 2: unknown adapter 'zz' (expected a, b, got zz)"),
    (
        '{"prompt": "x", "adapter": 3}',
        "line 2: `adapter` has a wrong type (expected a name, got 3)",
    ),
    (
        json.dumps({"prompt": "~" * 400}),
        "line 2: the prompt is longer than the context (expected at most 255 tokens",
    ),
    (
        '{"question": null}',
        "line 2: the adapter's prompt 'Ask: {{ question }}': a column it uses is null",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_one_line_and_nothing_is_written(
    row: str, message: str, command_line: CommandLine, tiny_decoder: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "fine"}\n' + row + "\n")
    code, _, err = command_line(
        "predict",
        decoder_bundle(tiny_decoder),
        "--input",
        source,
        "--output",
        output,
        "--adapter",
        "a",
    )
    assert code == 2
    assert f"{source}, {message}" in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such data file"),
        ("", "the file is empty"),
        ("\n\n", "there are no rows in this file"),
    ],
)
def test_a_missing_or_empty_file_is_one_line(
    content: str | None, message: str, command_line: CommandLine, tiny_decoder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    if content is not None:
        source.write_text(content)
    code, _, err = command_line(
        "predict",
        decoder_bundle(tiny_decoder),
        "--input",
        source,
        "--output",
        tmp_path / "out.jsonl",
    )
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"{source}: {message}" in err


def test_an_output_place_that_cannot_be_written_is_one_line(
    command_line: CommandLine, tiny_decoder: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    output = source / "out.jsonl"
    code, _, err = command_line(
        "predict",
        decoder_bundle(tiny_decoder),
        "--input",
        source,
        "--output",
        output,
        "--max-new-tokens",
        2,
    )
    assert (code, len(err.splitlines())) == (2, 1)
    assert "a part of the path is a file" in err


def told(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """What comes from standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


@pytest.mark.parametrize(
    "text",
    [
        "lights\n\ncard\n",
        '{"text": "lights"}\n{"text": "card"}\n',
        '[{"text":"lights"},{"text":"card"}]',
    ],
)
def test_standard_input_is_rows_or_a_text_a_line(
    text: str, command_line: CommandLine, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, text)
    code, out, err = command_line(
        "predict", encoder_bundle(tiny_encoder), "-", "--adapter", "intent", "--threads", 1
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, err, [row["text"] for row in rows]) == (0, "", ["lights", "card"])
    with Runtime.open(encoder_bundle(tiny_encoder), threads=1) as runtime:
        found = runtime.classify(["lights", "card"], "intent")
    assert [row["label"] for row in rows] == [one.label for one in found]


def test_a_bad_row_of_standard_input_is_one_line(
    command_line: CommandLine, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, message in [
        ('{"text": "a"}\n{"text"\n', "standard input, line 2: not valid JSON"),
        ('{"text": 3}\n', "standard input, line 1: `text` has a wrong value"),
        ("\n", "standard input: there is no text"),
    ]:
        told(monkeypatch, text)
        code, out, err = command_line(
            "predict", encoder_bundle(tiny_encoder), "-", "--adapter", "intent"
        )
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert message in err


TABLE = 'id;text;adapter\r\n1;lights;\r\n2;"card;\r\nnow";mood\r\n'


def test_a_table_is_read_as_training_reads_it_and_written_as_one(
    command_line: CommandLine, tiny_encoder: Path, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_bytes(b"\xef\xbb\xbf" + TABLE.encode())
    bundle, output = encoder_bundle(tiny_encoder), tmp_path / "out.csv"
    code, _, _ = command_line(
        "predict", bundle, "--input", tmp_path / "in.csv", "--output", output, "--adapter", "intent"
    )
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with Runtime.open(bundle, threads=1) as runtime:
        found = [
            runtime.classify([row["text"]], name)[0]
            for row, name in zip(rows, ("intent", "mood"), strict=True)
        ]
    assert (code, [row["id"] for row in rows]) == (0, ["1", "2"])
    assert rows[1]["text"].splitlines() == ["card;", "now"]
    assert [row["label"] for row in rows] == [one.label for one in found]


@pytest.mark.parametrize("arguments", [(), ("x", "--input", "f"), ("--input", "f")])
def test_wrong_usage_exits_2(
    arguments: tuple[str, ...], command_line: CommandLine, tiny_decoder: Path
) -> None:
    code, _, err = command_line("predict", decoder_bundle(tiny_decoder), *arguments)
    assert code == 2
    assert "Usage" in err


def test_a_folder_that_is_no_bundle_is_one_line(command_line: CommandLine, tmp_path: Path) -> None:
    code, _, err = command_line("predict", tmp_path, "x")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "no edgetune.json in this folder" in err


def test_a_text_a_line_is_a_prompt_where_text_is_generated(
    command_line: CommandLine, tiny_decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, "hello\nwhy?\n")
    code, out, _ = command_line(
        *("predict", decoder_bundle(tiny_decoder), "-", "--adapter", "a", "--max-new-tokens", 3)
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, [row["prompt"] for row in rows]) == (0, ["hello", "why?"])
    with Runtime.open(decoder_bundle(tiny_decoder), threads=1) as runtime:
        found = runtime.generate(["hello", "why?"], "a", max_new_tokens=3)
    assert [row["completion"] for row in rows] == [one.text for one in found]
