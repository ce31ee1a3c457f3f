"""A job divided into parts: which rows of which file, and what of it is answered already."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgetune.bulk.answers import Answerer
from edgetune.bulk.places import Folder, inputs_of, local_copy
from edgetune.core.errors import DataError, OutputError
from edgetune.core.files import TEMPORARY, sha256_file, sha256_text
from edgetune.core.layout import ADAPTER_CONFIG, ADAPTER_METADATA, ADAPTER_WEIGHTS, MANIFEST
from edgetune.data.rows import Rows, read_rows
from edgetune.runtime.tasks.prediction_file import row_line

PLAN = "job.json"
"""The file in the folder of answers that says what is answered there."""
ROWS = 1000
"""Rows of a part, where nothing else is asked for."""


@dataclass(frozen=True)
class RowRange:
    """Rows from `first` (counted from 0) to before `end` of one file, and where answers go."""

    number: int
    source: str
    first: int
    end: int
    digest: str
    """of the file as the job began with it"""

    @property
    def name(self) -> str:
        """The file of its answers."""
        return f"part-{self.number:05d}.jsonl"

    @property
    def failed_name(self) -> str:
        """The file of its rows that could not be answered, where there are any; not among the
        answers' *.jsonl.
        """
        return f"failed-{self.number:05d}.json"


@dataclass(frozen=True)
class FailedRow:
    """A row that could not be answered: its file, its number there (from 1), and why."""

    source: str
    row: int
    error: str


@dataclass(frozen=True)
class Done:
    """What became of a part."""

    number: int
    rows: int
    errors: int


@dataclass(frozen=True)
class Job:
    """All parts of a job in their order, and the folder of their answers."""

    parts: Sequence[RowRange]
    output: str

    def shard(self, i: int, n: int) -> Job:
        """The i-th (from 1) of n shares of the parts."""
        return Job([part for part in self.parts if part.number % n == i - 1], self.output)

    def unanswered(self) -> list[RowRange]:
        """The parts whose answers are not there yet."""
        there = Folder(self.output).names()
        return [part for part in self.parts if part.name not in there]

    def failed(self) -> list[FailedRow]:
        """The rows of answered parts that could not be answered, whoever tried."""
        folder = Folder(self.output)
        there, found = folder.names(), []
        for part in self.parts:
            if {part.name, part.failed_name} <= there:
                rows = _parsed(folder.read(part.failed_name) or b"")
                found += [FailedRow(**row) for row in rows or ()]
        return found


def plan(
    source: str, output: str, answers: Answerer, *, rows: int = ROWS, about: Mapping[str, Any]
) -> Job:
    """Divide the rows of files into parts, and write that down in the folder of answers.

    `about`: what answers depend on. OutputError where the folder holds another job, or other files;
    DataError for a file that cannot be read.
    """
    answers.runtime.task(answers.adapter_name)  # a bundle or an adapter that is none: no job
    parts: list[RowRange] = []
    files = {}
    _rows.cache_clear()  # a file of an earlier job may be another one by now
    for name in inputs_of(source):
        found = _rows(name)
        files[name] = {"rows": len(found.rows), "digest": found.digest}
        for first in range(0, len(found.rows), rows):
            end = min(first + rows, len(found.rows))
            parts.append(RowRange(len(parts), name, first, end, found.digest))
    job = {
        "bundle": sha256_file(Path(answers.bundle) / MANIFEST),
        "adapter": _adapter(answers),
        "rows_of_a_part": rows,
        "settings": {k: v for k, v in sorted(about.items()) if v is not None},
        "files": files,
    }
    job = json.loads(json.dumps(job))  # as it is read again
    folder = Folder(output)
    there = sorted(name for name in folder.names() if not TEMPORARY.match(name))
    known = folder.read(PLAN)  # after the names: another shard may be writing it
    if known is None:
        if there:
            raise OutputError(
                "this folder holds something else",
                where=output,
                expected="a new folder, or one that holds a part of the same job",
                got=", ".join(there[:3]),
            )
        folder.write(PLAN, (json.dumps(job, indent=1) + "\n").encode())
    elif (other := _difference(_parsed(known), job)) is not None:
        raise OutputError(
            f"this folder holds the answers of another job: {other}",
            where=output,
            fix="Give another folder, or the files and settings that the job began with.",
        )
    return Job(parts, output)


def answer_part(answers: Answerer, part: RowRange, output: str) -> Done:
    """Answer a part and write its file, whole or not at all. DataError where its rows are not those
    that the job began with.
    """
    found, folder = _rows(part.source), Folder(output)
    if found.digest != part.digest:
        raise DataError(
            "the file has changed since the job began",
            where=part.source,
            fix="Give another folder for the answers, or put the file back and go on.",
        )
    rows = [row.values for row in found.rows[part.first : part.end]]
    answered, failed = answers.answered(rows, source=part.source, first=part.first + 1)
    why = [asdict(FailedRow(part.source, part.first + 1 + at, failed[at])) for at in sorted(failed)]
    folder.write_if_any(part.failed_name, json.dumps(why, indent=1).encode() if why else b"")
    lines = "".join(map(row_line, answered))
    folder.write(part.name, lines.encode(errors="replace"))  # last: a part that is there is done
    return Done(part.number, len(answered), len(failed))


def answer_here(answers: Answerer, job: Job, parts: Sequence[RowRange]) -> Iterator[Done]:
    """Answer parts one after the other, in this process."""
    for part in parts:
        yield answer_part(answers, part, job.output)


def _adapter(answers: Answerer) -> str | None:
    """Its name, and of a folder's the digest of its files."""
    name = answers.adapter_name
    if (folder := answers.loaded) is None:
        return name
    files = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, ADAPTER_METADATA)  # as in jobs that are under way
    digests = [sha256_file(folder / one) for one in files if (folder / one).is_file()]
    return f"{name}@{sha256_text(' '.join(digests))}"


def _parsed(raw: bytes) -> Any:
    """What a plan holds; None where it is damaged."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


@lru_cache(maxsize=1)
def _rows(source: str) -> Rows:
    """All rows of a file; the last file stays read: parts of one file follow each other."""
    with local_copy(source) as path:
        return read_rows(path)


def _difference(known: Any, job: Mapping[str, Any]) -> str | None:
    """The first thing in which another job differs, or None."""
    if not isinstance(known, dict):
        return f"{PLAN} is damaged"
    for key, value in job.items():
        if known.get(key) == value:
            continue
        if key != "files" or not isinstance(known.get(key), dict):
            return f"{key} was {json.dumps(known.get(key))[:80]}, now {json.dumps(value)[:80]}"
        for name in {**known[key], **value}:
            if known[key].get(name) != value.get(name):
                return f"{name} is another file, or has other rows"
    return None


def as_row(part: RowRange) -> dict[str, Any]:
    """A part as a row of a data set."""
    return asdict(part)
