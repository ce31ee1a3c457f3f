"""Samples → percentiles → verdicts: ok, over, or too noisy to tell; estimates for a device that is
not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgetune.devices.budget import AT_LEAST, PERCENTILES, Budget, timed_key
from edgetune.devices.loader import Device

OK, OVER, NOISY = "ok", "over", "noisy"
RESAMPLES = 1000
CONFIDENCE = 95
ACHIEVABLE = 0.67
"""Share of a device's peak on paper that code reaches, where its profile says nothing of what was
measured: 11.4 of 17 GB/s on a Raspberry Pi 5.
"""
UNCERTAINTY = 1.5
"""An estimate may be off by this factor either way: kernels, caches and clocks do not scale with
two numbers.
"""
FORMULA = (
    "ttft, request, load, swap: host time x (host GFLOP/s / device GFLOP/s); "
    "tpot: host time x max(that, host GB/s / device GB/s); "
    f"device figures are what its profile says is sustained, else {ACHIEVABLE} x its peak; "
    f"uncertainty x/÷ {UNCERTAINTY}"
)


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


@dataclass(frozen=True)
class Speed:
    """What the host can do with the threads in use, measured: fp32 GFLOP/s and memory GB/s."""

    gflops: float
    gb_s: float


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
    measured: Mapping[str, Any], budget: Budget, *, device: Device, host: Speed | None = None
) -> list[Verdict]:
    """Every limit against the measurement; on another device against the estimate, for which `host`
    is needed. A GPU's times are not estimated from a processor's: they are left out.
    """
    verdicts = []
    for key, limit in budget.items():
        if host is not None and device.is_gpu and scale(key, device, host) is not None:
            continue
        for adapter, interval in _figures(measured, key):
            found, basis = interval, "measured"
            if (
                host is not None
                and not device.is_host
                and (factor := scale(key, device, host)) is not None
            ):
                found, basis = interval.times(factor, spread=UNCERTAINTY), "estimate"
            state = _state(found, limit, at_least=key in AT_LEAST)
            verdicts.append(
                Verdict(key, adapter, limit, found.value, found.low, found.high, state, basis)
            )
    return verdicts


def overall(verdicts: Sequence[Verdict]) -> str:
    """over if any limit is exceeded, else noisy if any cannot be told, else ok."""
    states = {verdict.state for verdict in verdicts}
    return next((state for state in (OVER, NOISY) if state in states), OK)


def scale(key: str, device: Device, host: Speed) -> float | None:
    """What a host time is multiplied by to estimate the device's; None for figures that do not
    change (memory, size).
    """
    reached = reachable(device)
    if reached is None:
        return None
    compute, memory = host.gflops / reached.gflops, host.gb_s / reached.gb_s
    timed = timed_key(key)
    if timed is not None:
        return max(compute, memory) if timed[0] == "tpot" else compute
    if key == "tokens_per_s":
        return 1 / max(compute, memory)
    return compute if key.endswith("load_ms") else None


def reachable(device: Device) -> Speed | None:
    """What code reaches there: as measured, where the profile has it, else a share of the peak;
    None for the host.
    """
    gflops = device.sustained_gflops or (device.peak_gflops or 0) * ACHIEVABLE
    gb_s = device.sustained_bandwidth_gb_s or (device.memory_bandwidth_gb_s or 0) * ACHIEVABLE
    return Speed(gflops, gb_s) if gflops and gb_s else None


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
