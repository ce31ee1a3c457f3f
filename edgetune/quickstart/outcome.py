"""What the quickstart found, and its table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from edgetune.core.layout import BUILTIN
from edgetune.core.progress import duration


@dataclass(frozen=True)
class TimedCall:
    """One request and its answers from the bundle: with the adapter, and without where the base can
    answer at all.
    """

    request: str
    answer: str
    score: float | None  # probability of the label; None for generated text
    base_answer: str | None


@dataclass(frozen=True)
class AdapterOutcome:
    """One adapter's figures; the three scores are of the same held-out rows and the same metric."""

    name: str
    title: str
    base: str
    metric: str  # "accuracy" | "json_exact_match" | "exact_match"
    rows: int
    base_how: str  # what stands in the base's row
    base_score: float
    torch_score: float
    bundle_score: float
    adapter_mb: float  # MB of 10^6 bytes
    proof: Mapping[str, Any]
    verdict: Mapping[str, Any]  # see export.proof.verdict
    records: Sequence[Mapping[str, Any]]  # the run's metrics.jsonl
    calls: Sequence[TimedCall]


@dataclass(frozen=True)
class ShipmentOutcome:
    """One bundle's figures."""

    name: str
    folder: str
    precision: str
    bundle_mb: float
    adapters: tuple[AdapterOutcome, ...]
    device: str
    state: str  # of the latency check: "ok" | "over" | "noisy"
    verdicts: Sequence[Mapping[str, Any]]
    measured: Mapping[str, Any]  # of the latency check, raw samples included

    def latency(self, adapter: str) -> Mapping[str, Any]:
        """Percentiles of one adapter."""
        found: Mapping[str, Any] = next(
            row for row in self.measured["adapters"] if row["adapter"] == adapter
        )
        return found


@dataclass(frozen=True)
class Step:
    """One step of the road and its wall-clock seconds."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """Everything; `preparation_seconds` is fetching and unpacking the bases, which only the first
    run does.
    """

    shipments: tuple[ShipmentOutcome, ...]
    steps: tuple[Step, ...]
    preparation_seconds: float
    peak_rss_mb: float  # of the process that trains and exports
    threads: int
    versions: Mapping[str, str]

    @property
    def seconds(self) -> float:
        """All steps, preparation not counted."""
        return sum(step.seconds for step in self.steps)

    @property
    def failures(self) -> list[str]:
        """Every limit of the device's budget that is exceeded. (A proof that fails stops the road
        before.)
        """
        return [
            f"{shipment.name}: {verdict['key']} is {verdict['value']:.4g}, limit"
            f" {verdict['limit']:g}"
            for shipment in self.shipments
            for verdict in shipment.verdicts
            if verdict["state"] == "over"
        ]


COLUMNS_SHOWN = (
    "adapter",
    "base model",
    "metric",
    "base",
    "torch",
    "bundle",
    "latency (p50)",
    "bundle size",
    "adapter size",
)
METRICS = {"json_exact_match": "exact match", "exact_match": "exact match"}


def result_table(outcome: Outcome) -> list[tuple[str, ...]]:
    """The cells of COLUMNS_SHOWN for every adapter."""
    return [
        (
            adapter.name,
            short_base_name(adapter.base),
            f"{METRICS.get(adapter.metric, adapter.metric)}, {adapter.rows} rows",
            percent(adapter.base_score),
            percent(adapter.torch_score),
            percent(adapter.bundle_score),
            latency_words(shipment.latency(adapter.name)),
            f"{shipment.precision} {shipment.bundle_mb:.0f} MB",
            f"{adapter.adapter_mb:.2f} MB",
        )
        for shipment in outcome.shipments
        for adapter in shipment.adapters
    ]


def result_lines(outcome: Outcome) -> list[str]:
    """The table as text, columns aligned, with what the base's column means below."""
    rows = [COLUMNS_SHOWN, *result_table(outcome)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS_SHOWN))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("─" * width for width in widths))
    how = dict.fromkeys(
        f"{short_base_name(a.base)}: {a.base_how}" for s in outcome.shipments for a in s.adapters
    )
    return [*lines, "base = " + "; ".join(how)]


def last_words(outcome: Outcome) -> str:
    """Time and memory in one line."""
    prepared = f" (and {duration(outcome.preparation_seconds)} to prepare the bases)"
    return (
        f"{duration(outcome.seconds)}{prepared}, peak memory {outcome.peak_rss_mb:,.0f} MB,"
        f" {counted(outcome.threads, 'thread')}"
    )


def latency_words(row: Mapping[str, Any]) -> str:
    """p50 of one adapter: a decoder's first token and rate, or an encoder's request."""
    if "ttft_ms" in row:
        rate = f", {row['tokens_per_s']['p50']:.0f} tokens/s" if "tokens_per_s" in row else ""
        return f"TTFT {row['ttft_ms']['p50']:.0f} ms{rate}"
    return f"{row['request_ms']['p50']:.1f} ms"


def percent(share: float) -> str:
    """0.8734 → 87.3 %."""
    return f"{100 * share:.1f} %"


def short_base_name(base: str) -> str:
    """A built-in base without its prefix, a folder without its parents."""
    return PurePath(base.removeprefix(BUILTIN)).name


def counted(count: int, noun: str) -> str:
    """1 thread, 2 threads."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
