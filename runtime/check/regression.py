"""A measurement against an earlier one: is this bundle, engine or code slower than it was?

Both sides hold rounds, each a process of its own, and beside every request the time of a fixed job
(`Yardstick`). A request's time is divided by its yardstick's, so a machine that is slower today is
not a regression. What differs from process to process widens the interval: it is Welch's, of the
rounds' medians, so a machine that scatters gives "too noisy to tell" instead of an alarm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.errors import DeviceError
from edgetune.runtime.check.verdict import NOISY, OK

SLOWER = "slower"
ALLOWED = 0.03
"""Slower by less than this is no regression."""
FEWEST_ROUNDS = 3
T_99 = {2: 6.96, 3: 4.54, 4: 3.75, 5: 3.36, 6: 3.14, 8: 2.90, 10: 2.76, 15: 2.60, 30: 2.46}
"""Student's t, 1 % on either side, by degrees of freedom (Abramowitz and Stegun, table 26.10); of
fewer the largest."""
YARDSTICKS = {"ttft_ms": "product_ms", "request_ms": "product_ms", "tpot_ms": "read_ms"}
"""The yardstick's job that is bound by the same as a figure: arithmetic, or memory."""
FIXED = ("prompt_tokens", "new_tokens", "threads", "batch")
"""Of a workload: what must be equal on both sides."""


@dataclass(frozen=True)
class Against:
    """A figure now beside before; `ratio`: of the rounds' medians, in units of their yardsticks."""

    key: str
    adapter: str | None
    before_ms: float
    now_ms: float
    ratio: float
    low: float
    high: float
    state: str

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self)


def read_baseline(path: Path) -> dict[str, Any]:
    """A file of `edgetune check --json`; DeviceError where it is none or has too few rounds."""
    fix = "Write one: edgetune check BUNDLE --rounds 15 --runs 6 --json FILE."
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        rounds = document["measured"]["rounds"]
        known = all(_figures(found) for found in rounds) and document["workload"].keys()
    except OSError as error:
        raise DeviceError(
            f"the baseline cannot be read: {error.strerror}", where=str(path), fix=fix
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeviceError(
            "no baseline of edgetune check", where=str(path), got=str(error)[:80], fix=fix
        ) from error
    if not known or len(rounds) < FEWEST_ROUNDS:
        raise DeviceError(
            "the baseline has too few rounds",
            where=str(path),
            expected=f"at least {FEWEST_ROUNDS}",
            got=str(len(rounds)),
            fix=fix,
        )
    found: dict[str, Any] = document
    return found


def changes(
    baseline: Mapping[str, Any],
    workload: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    *,
    allowed: float = ALLOWED,
) -> list[Against]:
    """Every figure that both sides have. DeviceError where they measured different work.

    `slower`: the ratio is above 1 + `allowed` and its interval (98 %) above 1; `too noisy to tell`:
    the interval reaches from below 1 to above 1 + 2 · `allowed`.
    """
    before = baseline["workload"]
    for name in FIXED:
        if before.get(name, 1) != workload.get(name, 1):
            raise DeviceError(
                f"the baseline measured another {name}",
                expected=str(before.get(name)),
                got=str(workload.get(name)),
                fix="Measure both with the same options.",
            )
    then, now = (_by_figure(side) for side in (baseline["measured"]["rounds"], rounds))
    found = [_change(key, then[key], now[key], allowed) for key in then if key in now]
    if not found:
        raise DeviceError(
            "the baseline has no figure in common with this measurement",
            expected=_named(then),
            got=_named(now),
        )
    return found


Key = tuple[str, str | None]
"""(figure, adapter)"""


@dataclass(frozen=True)
class _Round:
    """One process: the median of a figure in units of the yardstick, and in ms."""

    units: float
    ms: float


def _by_figure(rounds: Sequence[Mapping[str, Any]]) -> dict[Key, list[_Round]]:
    found: dict[Key, list[_Round]] = {}
    for one in rounds:
        for key, value in _figures(one).items():
            found.setdefault(key, []).append(value)
    return found


def _figures(one: Mapping[str, Any]) -> dict[Key, _Round]:
    """Of one round."""
    found = {}
    for run in one["runs"]:
        for figure, job in YARDSTICKS.items():
            if not run.get(figure):
                continue
            values = np.array([np.median(value) for value in run[figure]], np.float64)
            beside = np.array(run["yardstick"][job], np.float64)
            if not (np.isfinite(values).all() and (values > 0).all() and (beside > 0).all()):
                raise ValueError(f"{figure} holds what is no time")
            units = float(np.median(values / beside))
            found[figure, run["adapter"]] = _Round(units, float(np.median(values)))
    return found


def _change(key: Key, then: list[_Round], now: list[_Round], allowed: float) -> Against:
    sides = [np.log([one.units for one in side]) for side in (then, now)]
    ratio, low, high = welch(*sides)
    if ratio > 1 + allowed and low > 1:
        state = SLOWER
    elif low < 1 and high > 1 + 2 * allowed:
        state = NOISY
    else:
        state = OK
    ms = [float(np.median([one.ms for one in side])) for side in (then, now)]
    return Against(key[0], key[1], ms[0], ms[1], ratio, low, high, state)


def welch(
    then: npt.NDArray[np.float64], now: npt.NDArray[np.float64]
) -> tuple[float, float, float]:
    """The ratio of two sides' typical rounds, of their logarithms, and Welch's interval of it."""
    apart = float(now.mean() - then.mean())
    errors = [float(side.var(ddof=1)) / len(side) for side in (then, now)]
    error = sum(errors) ** 0.5
    if not error:
        return (float(np.exp(apart)),) * 3
    freedom = sum(errors) ** 2 / sum(
        one**2 / (len(side) - 1) for one, side in zip(errors, (then, now), strict=True)
    )
    known = [degrees for degrees in T_99 if degrees <= freedom] or [min(T_99)]
    reach = T_99[max(known)] * error
    return float(np.exp(apart)), float(np.exp(apart - reach)), float(np.exp(apart + reach))


def _named(found: Mapping[Key, Any]) -> str:
    return ", ".join(f"{figure} ({adapter or 'base model'})" for figure, adapter in found) or "none"
