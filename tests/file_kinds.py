"""Small files of every kind and format that people have, written by what they would be written
with.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = (
    "lamp", "door", "heating", "music", "garden", "kitchen", "window", "alarm", "parcel", "refund",
    "invoice", "account", "password", "delivery", "camera", "printer", "router", "screen",
)  # fmt: skip
LABELS = ("lights", "heat", "orders")
COUNT = 120  # enough that some are held out


def text(number: int) -> str:
    """Another text for each number."""
    first, second = WORDS[number % len(WORDS)], WORDS[(number // len(WORDS)) % len(WORDS)]
    third = WORDS[(number // len(WORDS) ** 2) % len(WORDS)]
    return f"please look at the {first} near the {second} and the {third}"


def each(make: Callable[[int], dict[str, Any]], count: int = COUNT) -> list[dict[str, Any]]:
    return [make(number) for number in range(count)]


def label(number: int) -> str:
    return LABELS[number % len(LABELS)]


KINDS: Mapping[str, list[dict[str, Any]]] = {
    "one label": each(lambda n: {"id": n, "message": text(n), "category": label(n)}),
    "numbers of classes": each(lambda n: {"text": text(n), "label": n % 4}),
    "a list of labels": each(
        lambda n: {"text": text(n), "labels": [label(n)] + ["urgent"] * (n % 2)}
    ),
    "labels in a cell": each(
        lambda n: {"text": text(n), "topics": label(n) + ("|urgent" if n % 2 else "")}
    ),
    "columns of 0 and 1": each(
        lambda n: {"comment": text(n), "toxic": n % 2, "insult": int(n % 3 == 0), "spam": 0}
    ),
    "a number": each(lambda n: {"review": text(n), "price": n * 7.25}),
    "a pair": each(
        lambda n: {"premise": text(n), "hypothesis": text(n + 1), "label": ("yes", "no")[n % 2]}
    ),
    "tags": each(
        lambda n: {
            "tokens": text(n).split(),
            "ner_tags": ["B-THING" if word in WORDS else "O" for word in text(n).split()],
        }
    ),
    "spans": each(
        lambda n: {"text": text(n), "entities": [[19, 19 + len(WORDS[n % len(WORDS)]), "THING"]]}
    ),
    "prompt and completion": each(
        lambda n: {"prompt": text(n), "completion": f"I look at number {n}."}
    ),
    "instructions": each(
        lambda n: {"instruction": text(n), "input": "", "output": f"I look at number {n}."}
    ),
    "questions": each(lambda n: {"question": text(n), "answer": f"The answer has number {n}."}),
    "OpenAI's conversations": each(
        lambda n: {
            "messages": [
                {"role": "user", "content": text(n)},
                {"role": "assistant", "content": f"number {n}"},
            ]
        }
    ),
    "ShareGPT's conversations": each(
        lambda n: {
            "conversations": [
                {"from": "human", "value": text(n)},
                {"from": "gpt", "value": f"number {n}"},
            ]
        }
    ),
    "JSON answers": each(
        lambda n: {"request": text(n), "response": json.dumps({"room": label(n), "level": n})}
    ),
    "preferences": each(
        lambda n: {"prompt": text(n), "chosen": f"Gladly, number {n}.", "rejected": "No."}
    ),
    "texts that are alike": each(
        lambda n: {"anchor": text(n), "positive": f"Number {n}.", "negative": f"No, {n + 1}."}
    ),
    "pairs without a label": each(
        lambda n: {"sentence1": text(n), "sentence2": f"It has number {n}."}
    ),
    "plain text": each(lambda n: {"text": f"{text(n)}. It is number {n}."}),
}
READ_AS = {
    "one label": "sequence-classification",
    "numbers of classes": "sequence-classification",
    "a list of labels": "multi-label",
    "labels in a cell": "multi-label",
    "columns of 0 and 1": "multi-label",
    "a number": "regression",
    "a pair": "sequence-classification",
    "tags": "token-classification",
    "spans": "token-classification",
    "prompt and completion": "sft",
    "instructions": "sft",
    "questions": "sft",
    "OpenAI's conversations": "sft",
    "ShareGPT's conversations": "sft",
    "JSON answers": "sft",
    "preferences": "dpo",
    "texts that are alike": "contrastive",
    "pairs without a label": "contrastive",
    "plain text": "causal-lm",
}


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], delimiter: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows]), path)
    return path


def write_xlsx(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append(list(row.values()))
    book.save(path)
    return path


def write_format(folder: Path, ending: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """The rows as `folder`/rows of this ending."""
    path = folder / f"rows{ending}"
    if ending == ".json":
        path.write_text(json.dumps([*rows]), encoding="utf-8")
    elif ending == ".csv":
        write_table(path, rows, ";")
    elif ending == ".tsv":
        write_table(path, rows, "\t")
    elif ending == ".parquet":
        write_parquet(path, rows)
    elif ending == ".xlsx":
        write_xlsx(path, rows)
    elif ending == ".jsonl.gz":
        path.write_bytes(gzip.compress(b"\n".join(json.dumps(row).encode() for row in rows)))
    else:
        write_jsonl(path, rows)
    return path


FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx", ".jsonl.gz")
