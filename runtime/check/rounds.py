"""Measurements in several rounds, each a process of its own: of one bundle, and of several side by
side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgetune.runtime.check.latency import TIMES, Workload, measure_latency, summaries
from edgetune.runtime.check.verdict import summary


@dataclass(frozen=True)
class Latency:
    """Medians over all rounds, ms and MB; `ttft_ms` and `tpot_ms` of decoders, `request_ms` of
    encoders.
    """

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
    """Measuring every workload once a round, every second round backwards; the medians of each."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in workloads}
    for at in range(rounds):
        for name in list(workloads)[:: -1 if at % 2 else 1]:
            results[name].append(measure_latency(workloads[name]))
    return {name: _medians(found) for name, found in results.items()}


def _medians(results: list[dict[str, Any]]) -> Latency:
    runs = [run for result in results for run in result["samples"]["runs"]]
    figures = {
        figure: (
            float(np.median(samples))
            if (samples := [x for run in runs for one in run.get(figure, []) for x in one])
            else None
        )
        for figure in TIMES
    }
    load, peak = (
        float(np.median([result[name] for result in results]))
        for name in ("load_ms", "peak_rss_mb")
    )
    return Latency(**figures, load_ms=load, peak_rss_mb=peak)


Measuring = Callable[[Workload], dict[str, Any]]


def measure_rounds(
    workload: Workload, *, rounds: int = 1, measure: Measuring = measure_latency
) -> dict[str, Any]:
    """`measure` so many times, as one measurement: all samples together, the median load,
    the highest peak; `rounds` has each round's samples.
    """
    found = [measure(workload) for _ in range(rounds)]
    together = found[-1]
    kept = [
        {"runs": one["samples"]["runs"], "machine": one["machine"], "load_ms": one["load_ms"]}
        for one in found
    ]
    samples = _together([one["samples"]["runs"] for one in found])
    swaps = [ms for one in found for ms in one["samples"]["swap_ms"]]
    return {
        **together,
        "load_ms": float(np.median([one["load_ms"] for one in found])),
        "adapter_load_ms": {
            name: float(np.median([one["adapter_load_ms"][name] for one in found]))
            for name in together["adapter_load_ms"]
        },
        "peak_rss_mb": max(one["peak_rss_mb"] for one in found),
        "adapters": [summaries(row) for row in samples],
        "swap_ms": summary([swaps]) if swaps else None,
        "machine": {
            **together["machine"],
            "before": found[0]["machine"]["before"],
            "notes": sorted({note for one in found for note in one["machine"]["notes"]}),
        },
        "samples": {"runs": samples, "swap_ms": swaps},
        "rounds": kept,
    }


def _together(rounds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The runs of every round behind each other, adapter by adapter."""
    joined = []
    for rows in zip(*rounds, strict=True):
        figures = [key for key in rows[0] if key not in ("adapter", "yardstick")]
        joined.append(
            {
                "adapter": rows[0]["adapter"],
                **{key: [value for row in rows for value in row[key]] for key in figures},
                "yardstick": {
                    job: [value for row in rows for value in row["yardstick"][job]]
                    for job in rows[0]["yardstick"]
                },
            }
        )
    return joined
