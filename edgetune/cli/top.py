"""`edgetune top`: a server, live in the terminal."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import click

from edgetune.core.errors import InputError

CLEAR = "\x1b[H\x1b[2J"


@click.command("top")
@click.argument("url", default="http://127.0.0.1:8000")
@click.option(
    "--interval",
    default=1.0,
    show_default=True,
    type=click.FloatRange(min=0.1),
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Print one page, since the server's start, and end.")
def command(url: str, interval: float, once: bool) -> None:
    """Watch the server at URL: rows, queue, cache, speed, latencies, adapters. Ctrl-C ends it."""

    url = url if "://" in url else f"http://{url}"
    key = os.environ.get("EDGETUNE_API_KEYS", "").split(",")[0].strip() or None
    watch = Watch(url)
    if once:
        click.echo(watch.page(read_metrics(url, time.monotonic(), key=key)))
        return
    while True:
        page = watch.page(read_metrics(url, time.monotonic(), key=key))
        click.echo(f"{CLEAR}{page}", nl=True)
        time.sleep(interval)


BLOCKS = "▁▂▃▄▅▆▇█"
Samples = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]
"""(name, labels) → value"""


@dataclass(frozen=True)
class MetricsReading:
    """One answer of `/metrics`, at a moment of `time.monotonic()`."""

    moment: float
    samples: Samples

    def value(self, name: str, **labels: str) -> float:
        """A sample; 0 where it is not there (yet)."""
        return self.samples.get((name, tuple(sorted(labels.items()))), 0.0)

    def by(self, name: str, label: str) -> dict[str, float]:
        """A family's values by one of its labels, summed over the others."""
        found: dict[str, float] = {}
        for (known, labels), value in self.samples.items():
            if known == name:
                key = dict(labels).get(label, "")
                found[key] = found.get(key, 0.0) + value
        return found


def read_metrics(
    url: str, moment: float, *, key: str | None = None, timeout_s: float = 5.0
) -> MetricsReading:
    """Ask a server. InputError when it does not answer, wants a key, or is no such server."""
    request = urllib.request.Request(f"{url.rstrip('/')}/metrics", headers=_headers(key))
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text = answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        fix = "Give its key in EDGETUNE_API_KEYS." if error.code == 401 else ""
        raise InputError(
            f"the server answered {error.code} {error.reason}", where=url, fix=fix
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        fix = "Give the address that `edgetune serve` printed."
        raise InputError(
            f"no answer: {reason}", where=url, expected="a running server", fix=fix
        ) from error
    try:
        samples = parse(text)
    except ValueError:  # another server's page
        samples = {}
    if not any(name.startswith("edgetune_") for name, _ in samples):
        raise InputError(
            "this is no server of edgetune's", where=url, expected="edgetune_… metrics"
        )
    return MetricsReading(moment, samples)


def parse(text: str) -> Samples:
    """The samples in Prometheus' text format; ValueError for another text."""
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Watch:
    """The last readings of one server, and the page they make."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._speeds: deque[float] = deque(maxlen=40)
        self._last: MetricsReading | None = None

    def page(self, now: MetricsReading) -> str:
        """What changed since the last reading (at the first: since the server's start), and the
        levels of now.
        """
        before = self._last or MetricsReading(now.moment, {})
        seconds = now.moment - before.moment
        self._last = now
        rate = Rates(before, now, seconds)
        speed = rate.per_second("edgetune_generated_tokens_total")
        if speed is not None:
            self._speeds.append(speed)
        blocks = [
            self._header(now),
            *_levels(now),
            "",
            *self._rates(rate, speed),
            "",
            *_adapters(rate),
        ]
        return "\n".join([*blocks, "", *_answers(rate)])

    def _header(self, now: MetricsReading) -> str:
        memory = now.value("edgetune_resident_memory_bytes") / 1e6
        return f"edgetune  {self.url}   {memory:.0f} MB resident"

    def _rates(self, rate: Rates, speed: float | None) -> list[str]:
        names = {"first token": "edgetune_ttft_seconds", "per token": "edgetune_tpot_seconds"}
        names |= {"queue wait": "edgetune_queue_wait_seconds"}
        lines = [f"generated   {_number(speed)} tokens/s   {sparkline(self._speeds)}"]
        lines.append(
            f"read        {_number(rate.per_second('edgetune_prompt_tokens_total'))} prompt"
            " tokens/s"
        )
        for title, name in names.items():
            middle, high = rate.quantile(name, 0.5), rate.quantile(name, 0.95)
            lines.append(f"{title:<11} {_ms(middle)} median   {_ms(high)} 95 %")
        return lines


class Rates:
    """Differences of two readings."""

    def __init__(self, before: MetricsReading, now: MetricsReading, seconds: float) -> None:
        self.before, self.now, self.seconds = before, now, seconds

    def per_second(self, name: str, **labels: str) -> float | None:
        """How fast a counter grows; None at the first reading."""
        grown = self.now.value(name, **labels) - self.before.value(name, **labels)
        return max(0.0, grown) / self.seconds if self.seconds > 0 else None

    def quantile(self, name: str, share: float) -> float | None:
        """A histogram's quantile in seconds, linear inside its bucket (as Prometheus'); None
        without observations.
        """
        before, now = self.before.by(f"{name}_bucket", "le"), self.now.by(f"{name}_bucket", "le")
        counts = sorted((float(le), count - before.get(le, 0.0)) for le, count in now.items())
        if not counts or counts[-1][1] <= 0:
            return None
        wanted, low, under = share * counts[-1][1], 0.0, 0.0
        for high, count in counts:
            if count >= wanted:
                return (
                    low
                    if high == float("inf")
                    else low + (high - low) * (wanted - under) / (count - under)
                )
            low, under = high, count
        return low


def sparkline(values: Iterable[float]) -> str:
    """Values as blocks of growing height."""
    shown = list(values)
    most = max(shown, default=0.0)
    return "".join(
        BLOCKS[round(value / most * (len(BLOCKS) - 1))] if most else BLOCKS[0] for value in shown
    )


def _levels(now: MetricsReading) -> list[str]:
    cache, whole = (
        now.value("edgetune_cache_used_bytes") / 1e6,
        now.value("edgetune_cache_bytes") / 1e6,
    )
    adapters = now.value("edgetune_adapter_bytes") / 1e6
    return [
        (
            f"rows        {now.value('edgetune_rows_running'):.0f} running  "
            f" {now.value('edgetune_queue_depth'):.0f} waiting  "
            f" {now.value('edgetune_batch_rows'):.0f} in the last step"
        ),
        (
            f"cache       {now.value('edgetune_cache_slots_used'):.0f} of"
            f" {now.value('edgetune_cache_slots'):.0f} slots   {cache:.1f} of {whole:.1f} MB  "
            f" {now.value('edgetune_prefix_hit_tokens_total'):.0f} prompt tokens reused"
        ),
        (
            f"adapters    {adapters:.1f} MB in memory  "
            f" {now.value('edgetune_adapter_evictions_total'):.0f} evicted"
        ),
    ]


def _adapters(rate: Rates) -> list[str]:
    now, shown = rate.now, []
    made = now.by("edgetune_adapter_generated_tokens_total", "adapter")
    asked = now.by("edgetune_adapter_requests_total", "adapter")
    for name in sorted(asked, key=lambda name: -asked[name])[:20]:
        speed = rate.per_second("edgetune_adapter_generated_tokens_total", adapter=name)
        counts = f"{asked[name]:>10.0f}{made.get(name, 0):>12.0f}"
        shown.append(f"{name or '(base)':<28}{counts}{_number(speed):>12}")
    return [f"{'adapter':<28}{'requests':>10}{'tokens':>12}{'tokens/s':>12}", *shown]


def _answers(rate: Rates) -> list[str]:
    statuses = rate.now.by("edgetune_http_requests_total", "status")
    ends = rate.now.by("edgetune_completions_total", "reason")
    lines = {"status": statuses, "ended by": ends}
    return [
        f"{title:<11} " + "   ".join(f"{k} {v:.0f}" for k, v in sorted(found.items()))
        for title, found in lines.items()
    ]


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _number(value: float | None) -> str:
    return "    –" if value is None else f"{value:5.1f}"


def _ms(seconds: float | None) -> str:
    return "     – ms" if seconds is None else f"{seconds * 1e3:6.1f} ms"
