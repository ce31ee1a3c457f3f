"""A device that is not here: what this bundle's requests read and compute, and how well this
machine's measured figures explain how long they took, give an ESTIMATE with its error.

A step or a prompt takes a · bytes / bandwidth + b · operations / arithmetic seconds (a roofline,
Williams et al. 2009, without overlap). Bandwidth and arithmetic are a machine's own; a and b belong
to the engine and its kernels: they are fitted to this machine, at several thread counts and prompt
lengths, and one of these is predicted from the others to know the error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from edgetune.devices.budget import timed_key
from edgetune.devices.loader import Device
from edgetune.runtime.check.host import Speed, host_speed
from edgetune.runtime.check.latency import TIMES, Workload, measure_latency

ACHIEVABLE = 0.67
"""Share of a device's peak on paper that code reaches, where its profile says nothing of what was
measured: 11.4 of 17 GB/s on a Raspberry Pi 5.
"""
UNCERTAINTY = 1.5
"""An estimate may be off by this factor either way, at least: another machine has other kernels,
caches and clocks.
"""
FEWER_RUNS, FEWER_TOKENS = 6, 17
"""Of a configuration that is measured only to project."""
FORMULA = (
    "measured time x model(device) / model(host), model = a x bytes / bandwidth + b x operations /"
    " arithmetic, a and b fitted to this machine; loads and swaps: x fp32 GFLOP/s of a thread here"
    " / there; device figures are what its profile says is sustained, else"
    f" {ACHIEVABLE} x its peak; uncertainty x/÷ {UNCERTAINTY} or the error held out"
)


@dataclass(frozen=True)
class Work:
    """Bytes read from memory and operations, of one figure's unit (a step, a prompt, a request)."""

    bytes: float
    operations: float

    def seconds(self, speed: Speed) -> tuple[float, float]:
        """At least, for the bytes and for the operations, on a machine of this speed."""
        return self.bytes / speed.gb_s / 1e9, self.operations / speed.gflops / 1e9


@dataclass(frozen=True)
class Configuration:
    """One configuration that was measured here: figure → work, and → seconds."""

    threads: int
    prompt_tokens: int
    speed: Speed
    work: Mapping[str, Work]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class HeldOut:
    """A configuration predicted from the others: how far off each figure was, as a share."""

    threads: int
    prompt_tokens: int
    errors: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The factor that the worst prediction was off by, at least 1."""
        return max((max(1 + e, 1 / (1 + e)) for e in self.errors.values()), default=1.0)


@dataclass(frozen=True)
class Projection:
    """From this machine to another: the points, the first of which is the measurement itself."""

    points: tuple[Configuration, ...]

    @property
    def speed(self) -> Speed:
        """Of this machine, with the threads of the measurement."""
        return self.points[0].speed

    @property
    def held_out(self) -> HeldOut | None:
        """The last configuration, predicted from the others; None where there is no other."""
        *others, last = self.points
        if not others:
            return None
        errors = {
            figure: _model(_fit(figure, others), last.work[figure], last.speed) / took - 1
            for figure, took in last.seconds.items()
        }
        return HeldOut(last.threads, last.prompt_tokens, errors)

    @property
    def spread(self) -> float:
        """An estimate may be off by this factor either way."""
        return max(UNCERTAINTY, self.held_out.worst if self.held_out else 1.0)

    def factor(self, key: str, device: Device) -> float | None:
        """What a budget key's time is multiplied by; None where it stays (memory, size)."""
        there, here = reachable(device), self.points[0]
        if there is None:
            return None
        timed = timed_key(key)
        figure = "tpot_ms" if key == "tokens_per_s" else f"{timed[0]}_ms" if timed else ""
        if figure in here.work:
            costs, work = _fit(figure, self.points), here.work[figure]
            ratio = _model(costs, work, there) / _model(costs, work, here.speed)
            return 1 / ratio if key == "tokens_per_s" else ratio
        if timed is None and not key.endswith("load_ms"):
            return None
        mine, theirs = (s.gflops / s.threads for s in (here.speed, there))
        return mine / theirs

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        out = self.held_out
        return {
            "points": [asdict(point) for point in self.points],
            "held_out": None if out is None else asdict(out),
            "spread": self.spread,
        }


def reachable(device: Device) -> Speed | None:
    """What code reaches there: as measured, where the profile has it, else a share of the peak;
    None for the host.
    """
    gflops = device.sustained_gflops or (device.peak_gflops or 0) * ACHIEVABLE
    gb_s = device.sustained_bandwidth_gb_s or (device.memory_bandwidth_gb_s or 0) * ACHIEVABLE
    return Speed(gflops, gb_s, device.threads) if gflops and gb_s else None


def project(workload: Workload, measured: Mapping[str, Any]) -> Projection:
    """The measurement, and the same bundle with one thread, with a shorter prompt, and with both,
    each in a process of its own.
    """
    few = replace(
        workload,
        adapters=workload.adapters[:1],
        runs=min(workload.runs, FEWER_RUNS),
        new_tokens=min(workload.new_tokens, FEWER_TOKENS),
    )
    here = configuration(workload, measured)
    short = max(1, here.prompt_tokens // 4)
    counts = (here.threads, 1) if here.threads > 1 else (1,)
    others = [(n, p) for p in (here.prompt_tokens, short) for n in reversed(counts)]
    points = [here]
    for threads, tokens in others:
        if (threads, tokens) != (here.threads, here.prompt_tokens):
            one = replace(few, threads=threads, prompt_tokens=tokens)
            points.append(configuration(one, measure_latency(one)))
    return Projection(tuple(points))


def configuration(workload: Workload, measured: Mapping[str, Any]) -> Configuration:
    """What a measurement says: work and seconds of each figure."""
    run, facts = measured["samples"]["runs"][0], measured["work"]
    seconds = {figure: _seconds(run, figure) for figure in TIMES if any(run.get(figure, []))}
    speed = host_speed(workload.threads)
    work = {figure: _work(figure, facts) for figure in seconds}
    return Configuration(speed.threads, facts["prompt_tokens"], speed, work, seconds)


def _seconds(run: Mapping[str, Any], figure: str) -> float:
    """The fastest step or request: what other processes took from the others is left out."""
    return float(np.concatenate(run[figure]).min()) / 1e3


def _work(figure: str, facts: Mapping[str, Any]) -> Work:
    """`facts`: see `latency.work_facts`. A token costs two operations a weight, and attention two
    a number of the keys and of the values before it.
    """
    tokens, rows = facts["prompt_tokens"], facts["batch"]
    attention = 4 * facts["layers"] * facts["hidden_size"] * tokens
    if figure == "tpot_ms":
        cache = facts["cache_bytes_a_token"] * tokens
        return Work(facts["weight_bytes"] + rows * cache, rows * (2 * facts["weights"] + attention))
    return Work(facts["weight_bytes"], rows * tokens * (2 * facts["weights"] + attention / 2))


def _model(costs: tuple[float, float], work: Work, speed: Speed) -> float:
    """Seconds."""
    reading, computing = work.seconds(speed)
    return costs[0] * reading + costs[1] * computing


def _fit(figure: str, points: Sequence[Configuration]) -> tuple[float, float]:
    """a and b, not below 0, of the least squares of the relative error. Points of one thread count
    cannot tell the two apart: they are one number then.
    """
    took = np.array([point.seconds[figure] for point in points])
    ideal = np.array([point.work[figure].seconds(point.speed) for point in points])
    rows = ideal / took[:, None]  # (points, 2)
    if len({point.threads for point in points}) < 2:
        alike = float(_least(rows.sum(axis=1)))
        return alike, alike
    both = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    singles = [(_least(rows[:, 0]), 0.0), (0.0, _least(rows[:, 1]))]
    return min(singles, key=lambda one: float(((rows @ np.array(one) - 1) ** 2).sum()))


def _least(row: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """x of the least squares of row · x = 1."""
    return float(row.sum() / (row @ row))
