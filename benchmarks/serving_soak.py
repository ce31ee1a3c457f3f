"""The serving benchmark's soak: mixed load on a real server while adapters come and go, every
answer checked.

A check was computed before, alone in the engine; an answer that is not it is counted apart when it
is the one of another adapter. Requests come at random times, whether others have ended or not:
checks, long prompts, structured answers, clients that vanish, malformed bodies, a monitor. Beside
them two clients of their own load adapters under one name, exchange them while a stream runs, and
unload them again. The memory of the server is read each second.
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from statistics import median

from serving_adapters import make_adapters
from serving_checks import find_checks
from serving_clients import Load, dispatch, left_running
from serving_load import Row, memory_mb, served

from edgetune.runtime import Runtime

ADAPTERS, STRENGTH, CHURNERS = 8, 0.2, 2
FLAT = 3.0
"""percent that memory may grow over the last two thirds of the time"""


def soak(options: argparse.Namespace, work: Path) -> list[Row]:
    """Mixed load for `--minutes`; prints what was counted, and examples of what should not have
    been.
    """
    library, seconds = work / "library", options.minutes * 60
    library.mkdir()
    with Runtime.open(options.bundle, threads=options.threads, adapter_folder=library) as runtime:
        names = make_adapters(library, runtime.manifest, ADAPTERS, strength=STRENGTH)
        checks, graph = find_checks(runtime, names), runtime.manifest.graph
        adapter_mb = runtime.adapter(names[0]).nbytes / 1e6
    limit = f"{3.5 * adapter_mb:.6f}"  # three and a half of eight adapters: evictions all the time
    flags = [
        "--adapter-library",
        str(library),
        "--adapter-folder",
        str(library),
        "--adapter-memory-mb",
        limit,
    ]
    flags += [
        "--threads",
        str(options.threads),
        "--max-rows",
        "8",
        "--max-queue",
        "32",
        "--cache-mb",
        "200",
    ]
    memory: list[tuple[float, float]] = []
    with served(options.bundle, work / "server.log", *flags) as server:
        load, over = (
            Load(server, checks, vocabulary=graph.vocab_size, context=graph.max_length),
            threading.Event(),
        )
        churners = [
            threading.Thread(target=load.churn, args=(f"hot{k}", over)) for k in range(CHURNERS)
        ]
        for thread in churners:
            thread.start()
        try:
            dispatch(
                load,
                rate=options.load,
                seconds=seconds,
                sample=lambda now: memory.append((now, memory_mb(server.process.pid))),
            )
        finally:
            over.set()
            for thread in churners:
                thread.join()
        left = left_running(load)
        errors = server.errors()
    seen = load.seen
    wrong = seen["wrong"] + seen["wrong, another adapter's"] + seen["structured, wrong"]
    print("\nsoak: " + ", ".join(f"{what} {count}" for what, count in sorted(seen.items())))
    print(
        f"server options: {' '.join(flags[4:])}; checks of {sum(map(len, checks.values()))} prompts"
    )
    print("\n".join([*load.examples, *errors[:5]]))
    tail = [mb for at, mb in memory if at >= seconds / 3]
    fifth = max(1, len(tail) // 5)
    early, late = median(tail[:fifth]), median(tail[-fifth:])
    print("\n".join(curve(memory)))
    return [
        Row("answers checked", seen["right"] + wrong, "", 1, at_least=True),
        Row("answers of the wrong adapter, or else wrong", wrong, "", 0),
        Row("status 5xx", seen["status 5xx"], "", 0),
        Row(
            "unexpected statuses, broken connections",
            seen["unexpected status"] + seen["broken"],
            "",
            0,
        ),
        Row("malformed requests not refused", seen["malformed, not refused"], "", 0),
        Row("error lines in the server's log", len(errors), "", 0),
        Row("requests still in the server after the last client left", left, "", 0),
        Row(
            "adapters loaded, exchanged under a stream, unloaded",
            seen["loaded, exchanged, unloaded"],
        ),
        Row("memory of the server, first fifth of the last two thirds", early, "MB"),
        Row("memory of the server, last fifth of them", late, "MB"),
        Row("memory growth between them", 100 * (late / early - 1), "%", FLAT),
    ]


def curve(memory: list[tuple[float, float]]) -> list[str]:
    """The median of each minute, ten a line."""
    minutes: dict[int, list[float]] = {}
    for at, mb in memory:
        minutes.setdefault(int(at // 60), []).append(mb)
    values = [f"{median(of):.0f}" for _, of in sorted(minutes.items())]
    return [
        f"memory, MB, a minute each from minute {k} on: {' '.join(values[k : k + 10])}"
        for k in range(0, len(values), 10)
    ]
