"""Latency of several bundles side by side: each in a fresh process, in turn, so that a slow moment hits all alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgetune.runtime.latency import Workload, measure

FIGURES = ("ttft_ms", "tpot_ms", "request_ms")


@dataclass(frozen=True)
class Latency:
    """Medians over all rounds, ms and MB; `ttft_ms` and `tpot_ms` of decoders, `request_ms` of encoders."""

    ttft_ms: float | None
    tpot_ms: float | None
    request_ms: float | None
    load_ms: float
    peak_rss_mb: float

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self)

    @property
    def step_ms(self) -> float:
        """Time of a further token of a decoder, of a request to an encoder."""
        value = self.tpot_ms if self.tpot_ms is not None else self.request_ms
        assert value is not None
        return value


def side_by_side(workloads: Mapping[str, Workload], *, rounds: int = 3) -> dict[str, Latency]:
    """Measure every workload once a round, every second round backwards; the medians of each."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in workloads}
    for at in range(rounds):
        for name in list(workloads)[:: -1 if at % 2 else 1]:
            results[name].append(measure(workloads[name]))
    return {name: _medians(found) for name, found in results.items()}


def _medians(results: list[dict[str, Any]]) -> Latency:
    runs = [run for result in results for run in result["samples"]["runs"]]
    figures = {
        figure: float(np.median(samples)) if (samples := [x for run in runs for one in run.get(figure, []) for x in one]) else None
        for figure in FIGURES
    }
    load, peak = (float(np.median([result[name] for result in results])) for name in ("load_ms", "peak_rss_mb"))
    return Latency(**figures, load_ms=load, peak_rss_mb=peak)
