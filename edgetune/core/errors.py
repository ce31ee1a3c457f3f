"""Every error a user can cause, as one tree. A leaf: any room may import it, it imports nothing.

EdgetuneError
├── RecipeError        a recipe file or a `--set` value
├── DataError          a data file or a row in it
├── BaseModelError     a base model that cannot be found, fetched or read
├── AdapterError       an adapter folder that does not fit, or an unknown adapter name
├── BundleError        a bundle folder that is damaged, incomplete or of another schema
├── SignatureError     a signature that is missing, not of this key or not of these files
├── InputError         a request to the runtime: a prompt too long, a wrong field
├── SourceError        a place that bundles and adapters come from or go to
├── OutputError        an output folder that cannot be written
├── DeviceError        a device profile or a budget
├── TrainingError      training that cannot go on (loss is NaN, no trainable weights)
├── ExportError        a model or an option the exporter does not support
└── ProofError         what would ship does not answer as what was trained

Library code raises these; only the command line turns them into exit codes.
"""

from __future__ import annotations

from collections.abc import Sequence

LISTED, LINE, MESSAGE = 50, 500, 10_000
"""What is shown of a list of problems, of one of them, and of a message: lines and characters."""


def listed(problems: Sequence[str], what: str) -> str:
    """One problem as it is; several under their number, each on a line of its own, the first
    `LISTED` of them.
    """
    if len(problems) == 1:
        return problems[0]
    lines = [_cut(line, LINE) for line in problems[:LISTED]]
    lines += [f"… and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
    return f"{len(problems)} {what}:" + "".join(f"\n  {line}" for line in lines)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


class EdgetuneError(Exception):
    """One line for a person: where, what, expected, got, what to do."""

    def __init__(
        self, what: str, *, where: str = "", expected: str = "", got: str = "", fix: str = ""
    ) -> None:
        self.what, self.where, self.expected, self.got, self.fix = what, where, expected, got, fix
        super().__init__(self._line())

    def _line(self) -> str:
        what = _cut(self.what, MESSAGE)
        line = f"{self.where}: {what}" if self.where else what
        facts = [
            f"{word} {_cut(value, MESSAGE)}"
            for word, value in (("expected", self.expected), ("got", self.got))
            if value
        ]
        if facts:
            line += f" ({', '.join(facts)})"
        return f"{line}. {self.fix}" if self.fix else line


class RecipeError(EdgetuneError):
    """A recipe file or a `--set` value."""


class DataError(EdgetuneError):
    """A data file or a row in it."""


class BaseModelError(EdgetuneError):
    """A base model that cannot be found, fetched or read."""


class AdapterError(EdgetuneError):
    """An adapter folder that does not fit, or an unknown adapter name."""


class BundleError(EdgetuneError):
    """A bundle folder that is damaged, incomplete or of another schema."""


class SignatureError(EdgetuneError):
    """A signature that is missing, not of this key or not of these files."""


class InputError(EdgetuneError):
    """A request to the runtime: a prompt too long, a wrong field."""


class SourceError(EdgetuneError):
    """A place that bundles and adapters come from or go to, or what it sent."""


class OutputError(EdgetuneError):
    """An output folder that cannot be written."""


class DeviceError(EdgetuneError):
    """A device profile or a budget."""


class TrainingError(EdgetuneError):
    """Training that cannot go on."""


class ExportError(EdgetuneError):
    """A model or an option the exporter does not support."""


class ProofError(EdgetuneError):
    """What would ship does not answer as what was trained."""
