"""Which version of our files says what an adapter is: a reader that does not know it would answer
otherwise, so it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMAT_VERSIONS = (1, 2)
"""`schema` of `edgetune_adapter.json` and of a bundle's manifest, as far as this version reads"""


def format_version(metadata: Mapping[str, Any]) -> int:
    """The lowest version whose readers answer as an adapter's metadata ask: 2 where words are
    marked for their capitals, a sentence's tags are chosen together, or a score below a threshold
    is no answer; else 1.
    """
    form, sure = metadata.get("prompt_format") or {}, metadata.get("confidence") or {}
    asks = form.get("case_marks") or form.get("tag_scheme") or sure.get("threshold") is not None
    return 2 if asks else 1


def unknown_version(found: Any) -> str | None:
    """A line where a file's `schema` is none that is known."""
    if type(found) is int and found in FORMAT_VERSIONS:
        return None
    known = " or ".join(map(str, FORMAT_VERSIONS))
    newer = isinstance(found, int) and found > FORMAT_VERSIONS[-1]
    return f"schema: expected {known}, got {found!r:.40}" + (
        "; a newer edgetune reads it" if newer else ""
    )
