"""Two files of `make bench`, compared: each measure of edgetune's that both hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.core.errors import DeviceError
from edgetune.core.files import read_json
from edgetune.runtime.check.regression import FEWEST_ROUNDS, SLOWER, welch
from edgetune.runtime.check.verdict import NOISY, OK

FEW = "too few rounds"
FIX = "Write one: make bench."


@dataclass(frozen=True)
class Compared:
    """A measure after beside before; `ratio` is after / before, with its interval (98 %).
    `peer`: of another engine, which is shown and decides nothing.
    """

    benchmark: str
    title: str
    figure: str
    unit: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    peer: bool
    state: str

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self)


def read_results(path: Path) -> dict[str, Any]:
    """A file of `make bench`; DeviceError where it is none."""
    found = read_json(path, error=DeviceError, fix=FIX)
    try:
        for benchmark in found["benchmarks"].values():
            for one in benchmark["measures"]:
                if not len(_rounds(one)) or not isinstance(one["more_is_better"], bool):
                    raise ValueError(f"{one['title']}: no samples, or no better side")
        _by_name(found)
        list(differences(found, {**found, "host": {}}))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        what = "not a results file of make bench"
        raise DeviceError(what, where=str(path), got=str(error)[:80], fix=FIX) from error
    results: dict[str, Any] = found
    return results


def compared(
    before: Mapping[str, Any], after: Mapping[str, Any], *, allowed: float
) -> list[Compared]:
    """Every measure that both hold and that has a ratio (no sample of 0 or below); DeviceError
    where there is none.

    `slower`: its interval lies on the worse side of `allowed` (a share of 1) as a whole, because so
    many figures are compared at once; `noisy`: it reaches beyond twice as much; `too few rounds`: a
    side has fewer than three, as what is taken once (memory, load).
    """
    sides = [_by_name(side) for side in (before, after)]
    found = [
        _compare(name, sides[0][name], sides[1][name], allowed)
        for name in sides[0]
        if name in sides[1] and all((_rounds(side[name]) > 0).all() for side in sides)
    ]
    if not found:
        raise DeviceError("the two files have no measure in common", fix="Run the same benchmarks.")
    return found


def overall(found: Sequence[Compared]) -> str:
    """The worst of edgetune's own; where nothing can be told, noisy."""
    states = {one.state for one in found if not one.peer} - {FEW}
    return next((state for state in (SLOWER, NOISY, OK) if state in states), NOISY)


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """(what, before, after) of all that is not a measure: host, versions, commands, rounds, memory
    read.
    """
    for key in dict.fromkeys([*before.get("host", {}), *after.get("host", {})]):
        yield from _differing(
            f"host {key}", *(side.get("host", {}).get(key) for side in (before, after))
        )
    for name, old in before["benchmarks"].items():
        new = after["benchmarks"].get(name)
        if new is None:
            continue
        for package in dict.fromkeys([*old.get("versions", {}), *new.get("versions", {})]):
            pair = (side.get("versions", {}).get(package) for side in (old, new))
            yield from _differing(f"{name}: {package}", *pair)
        for key in ("rounds", "commands"):
            yield from _differing(f"{name}: {key}", old.get(key), new.get(key))
        reads = [
            side.get("machine", {}).get("before", {}).get("read_gb_s", {}).get("all")
            for side in (old, new)
        ]
        if all(reads) and abs(reads[1] / reads[0] - 1) > 0.1:
            yield f"{name}: memory read", f"{reads[0]} GB/s", f"{reads[1]} GB/s"


def _differing(what: str, old: Any, new: Any) -> Iterator[tuple[str, str, str]]:
    if old != new:
        yield what, _text(old), _text(new)


def _text(value: Any) -> str:
    return "–" if value is None else ", ".join(value) if isinstance(value, list) else str(value)


Which = tuple[str, str, str, str]
"""(benchmark, title, figure, unit)"""


def _by_name(side: Mapping[str, Any]) -> dict[Which, Mapping[str, Any]]:
    return {
        (name, one["title"], one["figure"], one["unit"]): one
        for name, benchmark in side["benchmarks"].items()
        for one in benchmark["measures"]
    }


def _rounds(one: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The median of each round."""
    samples, size = np.asarray(one["samples"], np.float64), int(one["a_round"])
    if not len(samples) or size < 1 or not np.isfinite(samples).all():
        raise ValueError(f"{one['title']}: a sample that is no figure")
    return np.array([np.median(samples[at : at + size]) for at in range(0, len(samples), size)])


def _compare(
    name: Which, old: Mapping[str, Any], new: Mapping[str, Any], allowed: float
) -> Compared:
    then, now = _rounds(old), _rounds(new)
    peer = bool(new.get("peer"))
    if min(len(then), len(now)) < FEWEST_ROUNDS:
        ratio = float(np.median(now) / np.median(then))
        low, high, state = ratio, ratio, FEW
    else:
        ratio, low, high = welch(np.log(then), np.log(now))
        worse = (1 / high, 1 / low) if new["more_is_better"] else (low, high)
        state = SLOWER if worse[0] > 1 + allowed else NOISY if worse[1] > 1 + 2 * allowed else OK
    return Compared(
        *name, float(np.median(then)), float(np.median(now)), ratio, low, high, peer, state
    )
