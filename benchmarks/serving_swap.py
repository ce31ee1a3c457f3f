"""The serving benchmark's section `swap`: what another adapter costs a request."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from serving_adapters import linked, make_adapters
from serving_load import (
    STREAMS,
    Job,
    Prompts,
    Row,
    by_python,
    memory_mb,
    opened,
    percentile,
)

from edgetune.core.layout import ADAPTER_WEIGHTS
from edgetune.runtime import Runtime
from edgetune.runtime.engine.batch import Batch
from edgetune.runtime.scheduler.scheduler import Scheduler


def swap(options: argparse.Namespace, work: Path) -> list[Row]:
    """What another adapter costs a request: resident, from disk, and hundreds of them in memory."""
    with opened(options) as runtime:
        made = make_adapters(work / "made", runtime.manifest, STREAMS + 1, source=options.adapter)
    many = linked(work / "many", work / "made", made, options.adapters)
    limit = options.adapter_memory_mb
    with Runtime.open(
        options.bundle,
        threads=options.threads,
        adapter_folder=work / "many",
        adapter_memory_mb=limit,
        engine=options.engine[0],
    ) as runtime:
        before = memory_mb()
        assert len(runtime.registry.statuses()) >= len(many)
        listed = memory_mb() - before
        first = [_seconds(lambda name=name: runtime.registry.get(name)) for name in many]  # type: ignore[misc]
        used = memory_mb() - before
        cold = []
        for name in many[:50]:  # evicted long ago, unless everything fits
            _drop_from_page_cache(work / "many" / name / ADAPTER_WEIGHTS)
            cold.append(_seconds(lambda name=name: runtime.registry.get(name)))  # type: ignore[misc]
        evictions = runtime.registry.evictions
    rows = [
        Row(f"{len(many)} adapters registered: memory grows by", listed, "MB", 300),
        Row(
            f"all {len(many)} used once under a limit of {limit:g} MB ({evictions} evictions):"
            " memory grows by",
            used,
            "MB",
            300,
        ),
        Row("first use from disk, file in the page cache, p50", 1e3 * median(first), "ms", 15),
        Row("first use from disk, file in the page cache, p99", 1e3 * percentile(first, 99), "ms"),
        Row("first use from disk, page cache dropped, p50", 1e3 * median(cold), "ms"),
    ]
    with opened(options, work / "made") as runtime:
        for name in made:
            runtime.adapter(name)
        if options.engine[0] == "onnxruntime":  # the native engine binds nothing a request
            rows += _host_rows(runtime, made, options.samples)
        return rows + _request_rows(runtime, made, options.samples // 5)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _host_rows(runtime: Runtime, names: list[str], samples: int) -> list[Row]:
    """What a request does with its adapter outside the graph: lease, bind for prefill, bind for
    decoding, release.

    A difference of two p99 could fall below zero by chance and look like a target met, so p50 of
    the same is taken off.
    """
    assert runtime.decoder is not None
    batch = Batch(runtime.decoder, rows=STREAMS, budget=STREAMS * 128, max_context=128)

    def once(name: str) -> float:
        start = time.perf_counter()
        lease = runtime.registry.acquire(name)
        row = batch.begin(lease.resident.bound, tokens=64)
        row.length = 1
        batch.join()
        batch._bound_step()
        lease.release()
        seconds = time.perf_counter() - start
        batch.leave(row)
        return seconds

    def alternating(
        pairs: int,
    ) -> tuple[list[float], list[float]]:  # a a b b c c …: (another one, the same one)
        taken = [(once(name), once(name)) for name in (names[k % STREAMS] for k in range(pairs))]
        return [pair[0] for pair in taken], [pair[1] for pair in taken]

    alternating(20)
    other, same = alternating(samples)
    for name in names[1:STREAMS]:
        batch.begin(runtime.registry.get(name).bound, tokens=64).length = 1
        batch.join()
    once(names[0])
    spare, resident = [], []
    for _ in range(max(samples // 20, 5)):
        spare.append(once(names[STREAMS]))
        once(names[0])
        resident.append(once(names[0]))
    return [
        Row(
            "request's own work to bind a resident adapter, same as before, p50",
            1e6 * median(same),
            "µs",
        ),
        Row("… same as before, p99", 1e6 * percentile(same, 99), "µs"),
        Row("… another adapter than before, p50", 1e6 * median(other), "µs"),
        Row("… another adapter than before, p99", 1e6 * percentile(other, 99), "µs"),
        Row("added by switching, p50", 1e6 * (median(other) - median(same)), "µs"),
        Row(
            "added by switching, p99 of another less p50 of the same",
            1e6 * (percentile(other, 99) - median(same)),
            "µs",
            50,
        ),
        Row(
            "beside 7 rows of other adapters: row with the adapter its place had, p50",
            1e6 * median(resident),
            "µs",
        ),
        Row(
            "beside 7 rows: row with another adapter, copied into the mixed batch, p50",
            1e6 * median(spare),
            "µs",
        ),
        Row(
            "beside 7 rows: added by the copy, p99 of another less p50 of the same",
            1e6 * (percentile(spare, 99) - median(resident)),
            "µs",
            50,
        ),
    ]


def _request_rows(runtime: Runtime, names: list[str], pairs: int) -> list[Row]:
    """Whole requests of 8 prompt tokens and one answered token, alone in the engine."""
    prompts = Prompts(runtime.manifest.graph.vocab_size)
    with Scheduler(runtime, max_rows=1) as scheduler:

        def once(name: str) -> float:
            return by_python(scheduler, [Job(name, prompts(8), 1)])[0].end

        once(names[0])
        taken = [
            (once(name), once(name)) for name in (names[1 + k % STREAMS] for k in range(pairs))
        ]
    added = [another - same for another, same in taken]
    return [
        Row(
            "whole request of one token, same adapter as before, p50",
            1e6 * median(same for _, same in taken),
            "µs",
        ),
        Row(
            "whole request, added by another adapter than before, p50 of pairs",
            1e6 * median(added),
            "µs",
        ),
        Row(
            "whole request, p99 another less p99 same",
            1e6 * (percentile([a for a, _ in taken], 99) - percentile([s for _, s in taken], 99)),
            "µs",
        ),
    ]
