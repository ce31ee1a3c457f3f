"""Samples → percentiles → verdicts: ok, over, or too noisy to tell; estimates for a device that is
not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from edgetune.devices.budget import AT_LEAST, PERCENTILES, Budget, timed_key
from edgetune.devices.loader import Device

OK, OVER, NOISY = "ok", "over", "noisy"
RESAMPLES = 1000
CONFIDENCE = 95


@dataclass(frozen=True)
class Interval:
    """A figure with the range it may truly lie in."""

    value: float
    low: float
    high: float

    def times(self, factor: float, *, spread: float = 1.0) -> Interval:
        """Scaled, and widened by `spread` on both sides."""
        return Interval(
            self.value * factor, self.low * factor / spread, self.high * factor * spread
        )


class Projection(Protocol):
    """From this machine to another: `projection.Projection`, which needs the measurement's
    modules.
    """

    @property
    def spread(self) -> float:
        """An estimate may be off by this factor either way."""

    def factor(self, key: str, device: Device) -> float | None:
        """What a budget key's time is multiplied by; None where it stays."""


@dataclass(frozen=True)
class Verdict:
    """One limit of the budget against what was found. `basis`: measured | estimate."""

    key: str
    adapter: str | None
    limit: float
    value: float
    low: float
    high: float
    state: str
    basis: str

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self)


def percentile(groups: Sequence[Sequence[float]], p: int) -> Interval:
    """The p-th percentile of all samples and its 95 % bootstrap interval.

    Samples of one request belong together (they share its noise), so whole groups are resampled
    (cluster bootstrap; Efron & Tibshirani 1993, ch. 8). Deterministic: fixed seed.
    """
    arrays = [np.asarray(group, float) for group in groups if len(group)]
    value = float(np.percentile(np.concatenate(arrays), p))
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(arrays), (RESAMPLES, len(arrays)))
    resampled = [
        float(np.percentile(np.concatenate([arrays[i] for i in pick]), p)) for pick in picks
    ]
    low, high = np.percentile(resampled, [(100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2])
    return Interval(value, float(min(low, value)), float(max(high, value)))


def summary(groups: Sequence[Sequence[float]]) -> dict[str, float]:
    """n, mean, p50, p90, p95, p99 of all samples."""
    values = np.concatenate([np.asarray(group, float) for group in groups])
    figures = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return {"n": len(values), "mean": float(values.mean()), **figures}


def judge(
    measured: Mapping[str, Any],
    budget: Budget,
    *,
    device: Device,
    projection: Projection | None = None,
) -> list[Verdict]:
    """Every limit against the measurement; on another device against the estimate, for which
    `projection` is needed. A GPU's times are not estimated from a processor's: they are left out.
    """
    verdicts = []
    for key, limit in budget.items():
        factor = None if projection is None else projection.factor(key, device)
        if projection is not None and factor is not None and device.is_gpu:
            continue
        for adapter, interval in _figures(measured, key):
            found, basis = interval, "measured"
            if projection is not None and factor is not None:
                found, basis = interval.times(factor, spread=projection.spread), "estimate"
            state = _state(found, limit, at_least=key in AT_LEAST)
            verdicts.append(
                Verdict(key, adapter, limit, found.value, found.low, found.high, state, basis)
            )
    return verdicts


def overall(verdicts: Sequence[Verdict]) -> str:
    """over if any limit is exceeded, else noisy if any cannot be told, else ok."""
    states = {verdict.state for verdict in verdicts}
    return next((state for state in (OVER, NOISY) if state in states), OK)


def _state(found: Interval, limit: float, *, at_least: bool) -> str:
    if at_least:
        return OK if found.low >= limit else OVER if found.high < limit else NOISY
    return OK if found.high <= limit else OVER if found.low > limit else NOISY


def _figures(measured: Mapping[str, Any], key: str) -> list[tuple[str | None, Interval]]:
    """(adapter, figure) of one budget key; none when this bundle has no such figure (no TTFT for an
    encoder).
    """
    timed, samples = timed_key(key), measured["samples"]
    if timed is not None:
        metric, p = timed
        if metric == "swap":
            return (
                [(None, percentile([[s] for s in samples["swap_ms"]], p))]
                if samples["swap_ms"]
                else []
            )
        return [
            (r["adapter"], percentile(r[f"{metric}_ms"], p))
            for r in samples["runs"]
            if r.get(f"{metric}_ms")
        ]
    if key == "tokens_per_s":
        intervals = [
            (r["adapter"], percentile(r["tpot_ms"], 50))
            for r in samples["runs"]
            if r.get("tpot_ms")
        ]
        return [(name, Interval(1e3 / i.value, 1e3 / i.high, 1e3 / i.low)) for name, i in intervals]
    if key == "adapter_load_ms":
        return [(name, Interval(ms, ms, ms)) for name, ms in measured["adapter_load_ms"].items()]
    value = measured.get(key)
    return [] if value is None else [(None, Interval(value, value, value))]
