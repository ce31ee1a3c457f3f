"""One row of a data file: its columns, the place where it stands, and it as bare texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One row: its line in the file (from 1; in Parquet the row's number) and its columns."""

    line: int
    values: dict[str, Any]


@dataclass(frozen=True)
class RowTexts:
    """A row that can be used. `asked` is what the model reads of it, `answered` what it shall make
    of that ("" where nothing is asked), `names` the labels or tags in it.
    """

    line: int
    asked: str
    answered: str = ""
    names: tuple[str, ...] = ()


class LineOf(int):
    """A line of one of several files: a number that no other row has, printed with its file."""

    file: str
    line: int

    @classmethod
    def of(cls, line: int, file: str, number: int) -> LineOf:
        """Line `line` of `file`, which is row `number` of all files."""
        made = cls(number)
        made.file, made.line = file, line
        return made

    def __str__(self) -> str:
        return f"{self.line} of {self.file}"

    def __getnewargs__(self) -> tuple[int]:
        return (int(self),)
