"""What a budget can limit: the keys, their units and which direction is good."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from edgetune.core.errors import DeviceError

Budget = dict[str, float]
"""key → limit; an upper limit, for `tokens_per_s` a lower one."""
PERCENTILES = (50, 90, 95, 99)
TIMED = {
    "ttft": "time to first token of a decoder",
    "tpot": "time per output token after the first",
    "request": "time of one encoder request",
    "swap": "time to switch to another resident adapter",
}
SCALARS = {
    "tokens_per_s": "decoded tokens per second, at least",
    "load_ms": "opening the bundle, hashes included, in a fresh process",
    "adapter_load_ms": "reading and checking one adapter from disk",
    "peak_rss_mb": "peak resident memory of a process of its own",
    "bundle_mb": "size of the bundle on disk",
}
AT_LEAST = frozenset({"tokens_per_s"})
TIMED_KEY = re.compile(rf"(?P<metric>{'|'.join(TIMED)})(?:_p(?P<percentile>50|90|95|99))?_ms")
DEFAULT_PERCENTILE = 95


def budget_keys() -> dict[str, str]:
    """Every key with what it limits; `ttft_ms` without a percentile means p95."""
    keys = {}
    for metric, meaning in TIMED.items():
        keys[f"{metric}_ms"] = f"p{DEFAULT_PERCENTILE} of the {meaning}"
        keys |= {f"{metric}_p{p}_ms": f"p{p} of the {meaning}" for p in PERCENTILES}
    return keys | SCALARS


def timed_key(key: str) -> tuple[str, int] | None:
    """`ttft_p90_ms` → ("ttft", 90), `ttft_ms` → ("ttft", 95); None for the other keys."""
    match = TIMED_KEY.fullmatch(key)
    return (
        None if match is None else (match["metric"], int(match["percentile"] or DEFAULT_PERCENTILE))
    )


def check_budget(values: Mapping[str, Any], *, where: str) -> Budget:
    """A table of limits; DeviceError for an unknown key or a limit that is no positive number."""
    known = budget_keys()
    for key, value in values.items():
        if key not in known:
            short = [k for k in known if timed_key(k) is None or "_p" not in k]
            raise DeviceError(
                f"unknown budget key {key!r}", where=where, expected=", ".join(short), got=key
            )
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < math.inf
        ):
            raise DeviceError(
                f"the limit of {key} is wrong",
                where=where,
                expected="a number above 0",
                got=repr(value),
            )
    return {key: float(value) for key, value in values.items()}


def parse_budget(pairs: Iterable[str]) -> Budget:
    """`--budget` values, each `key=limit`."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        try:
            values[key.strip()] = float(text)
        except ValueError as error:
            fix = "For example --budget ttft_ms=500."
            raise DeviceError(
                "a budget is key=number", where="--budget", got=pair, fix=fix
            ) from error
        if not separator:
            raise DeviceError("a budget is key=number", where="--budget", got=pair)
    return check_budget(values, where="--budget")
