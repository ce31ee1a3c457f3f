"""One way to read a file, and how it is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgetune.core.tasks import METHODS, MethodName, Problem

Given = Mapping[str, str]  # keys of `data` that the user has given
PAIRS = (
    ("sentence1", "sentence2"), ("text1", "text2"), ("text_a", "text_b"),
    ("premise", "hypothesis"), ("question1", "question2"), ("question", "passage"),
    ("question", "sentence"), ("query", "passage"), ("query", "document"), ("text", "text_pair"),
)  # fmt: skip
UNREAD = ("grpo",)  # methods that no column says by itself
TASKS: dict[str, tuple[MethodName, Problem]] = {
    **{name: (name, "single-label") for name in METHODS if name not in UNREAD},
    "multi-label": ("sequence-classification", "multi-label"),
    "regression": ("sequence-classification", "regression"),
}


@dataclass(frozen=True)
class Reading:
    """One way to read a file: the task (a method, or a problem of sequence-classification), the
    settings of `data` that it needs, and a sentence. `point`: what stands before the fractions of
    a label that is a number and is not written plainly.
    """

    task: str
    data: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    what: str = ""
    point: str | None = None

    @property
    def method(self) -> MethodName:
        return TASKS[self.task][0]

    @property
    def problem(self) -> Problem:
        return TASKS[self.task][1]

    def options(self) -> str:
        """What on the command line asks for this reading."""
        return f"--task {self.task}" + "".join(
            f" --{key.replace('_', '-')} {quoted(value)}"
            for key, value in self.data.items()
            if isinstance(value, str)
        )


def quoted(value: str) -> str:
    """A value as a shell wants it."""
    return value if re.fullmatch(r"[\w.-]+", value) else "'" + value.replace("'", "'\\''") + "'"
