"""What `/metrics` tells Prometheus: HTTP requests and latencies counted here, the scheduler's own
counters read live.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edgetune.core.memory import peak_rss_mb
from edgetune.runtime.rollout.aliases import Aliases
from edgetune.runtime.scheduler.scheduler import Scheduler
from edgetune.runtime.tasks.answers import Completion

BATCH_BUCKETS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TPOT_BUCKETS = (0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.025, 0.04, 0.06, 0.1, 0.2, 0.5)
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One server's counters, in a registry of their own so that two servers in a process do not
    meet.
    """

    def __init__(self, scheduler: Scheduler, aliases: Aliases) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "edgetune_http_requests",
            "Requests answered.",
            ("route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "edgetune_http_request_seconds",
            "From the request's first byte to the answer's last.",
            ("route",),
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.open = Gauge(
            "edgetune_http_requests_open", "Requests under way.", registry=self.registry
        )
        self.ttft = Histogram(
            "edgetune_ttft_seconds",
            "Time to first token, the wait in the queue included.",
            buckets=TTFT_BUCKETS,
            registry=self.registry,
        )
        self.tpot = Histogram(
            "edgetune_tpot_seconds",
            "Mean time of a token after the first, of each completion.",
            buckets=TPOT_BUCKETS,
            registry=self.registry,
        )
        self.queue_wait = Histogram(
            "edgetune_queue_wait_seconds",
            "Wait in the queue.",
            buckets=TTFT_BUCKETS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "edgetune_answer_batch_rows",
            "Rows that ran together, seen at the end of each completion.",
            buckets=BATCH_BUCKETS,
            registry=self.registry,
        )
        self.versions = Counter(
            "edgetune_version_requests",
            "Requests for an alias, by the version that answered.",
            ("alias", "version", "status"),
            registry=self.registry,
        )
        self.version_seconds = Histogram(
            "edgetune_version_request_seconds",
            "The same requests, from the first byte to the answer's last.",
            ("alias", "version"),
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.rollout_steps = Counter(
            "edgetune_rollout_steps",
            "Steps of roll-outs: fetched, checked, trial, kept, settled, rolled back, refused …",
            ("alias", "step"),
            registry=self.registry,
        )
        self.registry.register(SchedulerCollector(scheduler))
        self.registry.register(AliasCollector(aliases))

    def completed(self, completion: Completion, *, rows: int) -> None:
        """One generated text has ended."""
        self.batch.observe(rows)
        self.queue_wait.observe(completion.queue_ms / 1e3)
        if completion.completion_tokens:
            self.ttft.observe(completion.ttft_ms / 1e3)
        if completion.tpot_ms is not None:
            self.tpot.observe(completion.tpot_ms / 1e3)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class AliasCollector(Collector):
    """Which version answers for an alias, and for which share."""

    def __init__(self, aliases: Aliases) -> None:
        self._aliases = aliases

    def collect(self) -> Iterator[Metric]:
        """As it is when Prometheus asks."""
        family = GaugeMetricFamily(
            "edgetune_alias_share",
            "Share of an alias's requests that a version answers.",
            labels=("alias", "version"),
        )
        for alias, shares in self._aliases.all().items():
            for version, share in shares.items():
                family.add_metric([alias, version], share)
        yield family


class SchedulerCollector(Collector):
    """The scheduler's counters, read when Prometheus asks."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        """One family after another, all of one moment."""
        stats = self._scheduler.stats()
        levels = {
            "edgetune_rows_running": (stats.running, "Rows in prefill or decode."),
            "edgetune_queue_depth": (stats.waiting, "Requests waiting."),
            "edgetune_batch_rows": (stats.batch_rows, "Rows of the last decode step."),
            "edgetune_cache_slots_used": (stats.cache_slots_used, "Cache slots in use."),
            "edgetune_cache_slots": (stats.cache_slots_total, "Cache slots there are."),
            "edgetune_cache_used_bytes": (stats.cache_bytes, "Key-value cache in use."),
            "edgetune_cache_bytes": (stats.cache_bytes_total, "Key-value cache allocated."),
            "edgetune_adapter_bytes": (stats.adapter_bytes, "Memory of the resident adapters."),
            "edgetune_resident_memory_bytes": (resident_bytes(), "Resident memory of the process."),
        }
        for name, (value, text) in levels.items():
            yield GaugeMetricFamily(name, text, value=value)
        totals = {
            "edgetune_prompt_tokens": (stats.prompt_tokens_total, "Prompt tokens read."),
            "edgetune_generated_tokens": (stats.tokens_generated_total, "Tokens generated."),
            "edgetune_decode_steps": (stats.steps_total, "Decode steps."),
            "edgetune_decode_seconds": (stats.step_seconds_total, "Time inside decode steps."),
            "edgetune_prefill_seconds": (stats.prefill_seconds_total, "Time reading prompts."),
            "edgetune_prefix_hit_tokens": (
                stats.prefix_hit_tokens_total,
                "Prompt tokens found in the cache.",
            ),
            "edgetune_prefix_evictions": (
                stats.prefix_evictions_total,
                "Cached prefixes given up.",
            ),
            "edgetune_adapter_evictions": (
                stats.adapter_evictions_total,
                "Adapters put out of memory.",
            ),
            "edgetune_guessed_tokens": (stats.guessed_tokens_total, "Tokens guessed from prompts."),
            "edgetune_right_guesses": (
                stats.right_guesses_total,
                "Guessed tokens that were right.",
            ),
            "edgetune_encoded_rows": (stats.encoded_rows_total, "Texts classified or embedded."),
        }
        for name, (count, text) in totals.items():
            yield CounterMetricFamily(name, text, value=count)
        engine = self._scheduler.runtime.engine
        which = GaugeMetricFamily(
            "edgetune_engine", "The engine that answers.", labels=("engine", "instructions")
        )
        which.add_metric([engine.name, engine.instructions or ""], 1)
        yield which
        running = GaugeMetricFamily(
            "edgetune_execution_provider",
            "Execution providers in use, in order of preference.",
            labels=("provider",),
        )
        for place, name in enumerate(self._scheduler.runtime.providers.names, 1):
            running.add_metric([name], place)
        yield running
        yield _labelled(
            "edgetune_completions",
            "Completions by how they ended.",
            "reason",
            stats.requests_total.items(),
        )
        adapters = stats.adapters.items()
        yield _labelled(
            "edgetune_adapter_requests",
            "Rows an adapter answered.",
            "adapter",
            ((n, a.requests) for n, a in adapters),
        )
        yield _labelled(
            "edgetune_adapter_prompt_tokens",
            "Prompt tokens an adapter read.",
            "adapter",
            ((n, a.prompt_tokens) for n, a in adapters),
        )
        yield _labelled(
            "edgetune_adapter_generated_tokens",
            "Tokens an adapter generated.",
            "adapter",
            ((n, a.tokens) for n, a in adapters),
        )


def _labelled(
    name: str, text: str, label: str, values: Iterable[tuple[str, float]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=(label,))
    for key, value in values:
        family.add_metric([key], value)
    return family


def resident_bytes() -> int:
    """Memory the process holds now; where the system does not tell, the most it ever held."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return int(peak_rss_mb() * 1e6)
