"""Numbers as people write them in tables: 3,5 or 1.234,50 € or 12 %."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

AROUND = re.compile(r"[\s'’€$£¥%]|\b(?:EUR|USD|GBP|CHF)\b")  # what is passed over
SPELLINGS = {  # what stands before the fractions → a number
    point: re.compile(rf"[+-]?(?:\d+|[1-9]\d{{0,2}}(?:{other}\d{{3}})+)(?:{re.escape(point)}\d+)?")
    for point, other in ((".", ","), (",", r"\."))
}


def number_of(value: Any, point: str = ".") -> float:
    """The number that a text spells, with `point` before its fractions; currency, percent and
    thousands marks are passed over. ValueError for what is no finite number.
    """
    if isinstance(value, str):
        bare = AROUND.sub("", value).replace("−", "-")
        if point in SPELLINGS and SPELLINGS[point].fullmatch(bare):
            whole, _, fractions = bare.partition(point)
            return float(re.sub(r"[.,]", "", whole) + "." + fractions)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{str(value)[:40]!r} is no number")
    return number


def point_of(texts: Iterable[str], *, share: float = 1.0) -> str | None:
    """What stands before the fractions of (a `share` of) these numbers, a full stop where both
    would do; None where they are no numbers.
    """
    bare = [AROUND.sub("", text).replace("−", "-") for text in texts]
    fitting = {p: sum(map(bool, map(one.fullmatch, bare))) for p, one in SPELLINGS.items()}
    most = max(fitting, key=lambda point: fitting[point])
    return most if bare and fitting[most] >= share * len(bare) else None
