"""The serving benchmark's sections `http` and `cold`: what HTTP and a fresh process add."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from serving_adapters import make_adapters
from serving_load import (
    STREAMS,
    Answer,
    Job,
    Prompts,
    Row,
    by_http,
    by_python,
    made,
    middle,
    no_end,
    opened,
    served,
    speed,
)

from edgetune.runtime.scheduler.scheduler import Scheduler


def http(options: argparse.Namespace, work: Path) -> list[Row]:
    """The same load through `edgetune serve` and through the scheduler of this process."""
    library = work / "library"
    with opened(options, made(library)) as runtime:
        names = make_adapters(library, runtime.manifest, STREAMS, source=options.adapter)
        prompts, bias = Prompts(runtime.manifest.graph.vocab_size), no_end(runtime)
        flags = (
            "--adapter-library",
            str(library),
            "--threads",
            str(options.threads),
            "--max-rows",
            str(STREAMS),
            "--engine",
            options.engine[0],
        )
        with (
            served(options.bundle, work / "server.log", *flags) as server,
            Scheduler(runtime, max_rows=STREAMS) as scheduler,
        ):
            ways: dict[str, Callable[[Sequence[Job]], list[Answer]]] = {
                "python": lambda jobs: by_python(scheduler, jobs),
                "http": lambda jobs: by_http(server.port, jobs, bias),
            }
            whole: dict[str, list[float]] = {way: [] for way in ways}
            alone: dict[str, list[float]] = {way: [] for way in ways}
            loaded: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(options.rounds + 1):
                together = [Job(name, prompts(options.prompt), options.new) for name in names]
                single = [
                    Job(names[k % STREAMS], prompts(options.prompt), 1)
                    for k in range(options.singles)
                ]
                spread = [
                    Job(name, prompts(options.prompt), options.new // 4, at=k / options.rate)
                    for k, name in enumerate(names * 2)
                ]
                for way in list(ways)[:: -1 if turn % 2 else 1]:
                    answers, firsts = (
                        ways[way](together),
                        [ways[way]([job])[0].first for job in single],
                    )
                    arrived = ways[way](spread)
                    if turn:
                        whole[way].append(speed(answers))
                        alone[way].append(1e3 * median(firsts))
                        loaded[way].append(1e3 * median(answer.first for answer in arrived))
            log = server.errors()
    if log:
        raise SystemExit(f"the server logged errors: {log[0]}")
    lost = [100 * (1 - h / p) for h, p in zip(whole["http"], whole["python"], strict=True)]
    rows = [middle(f"8 streams, 8 adapters, {way}", whole[way], "tokens/s") for way in ways]
    rows.append(middle("tokens/s lost to HTTP", lost, "%", 5))
    rows += [
        middle(f"time to first token of a single request, {way}", alone[way], "ms") for way in ways
    ]
    rows.append(
        middle(
            "added by HTTP to the first token of a single request",
            [h - p for h, p in zip(alone["http"], alone["python"], strict=True)],
            "ms",
            3,
        )
    )
    rows += [
        middle(
            f"time to first token, open loop of {options.rate:g} requests/s, {way}",
            loaded[way],
            "ms",
        )
        for way in ways
    ]
    rows.append(
        middle(
            "added by HTTP to the first token, open loop",
            [h - p for h, p in zip(loaded["http"], loaded["python"], strict=True)],
            "ms",
        )
    )
    return rows


def cold(options: argparse.Namespace, work: Path) -> list[Row]:
    """`edgetune predict` from the start of the process to the first byte of the answer."""
    ways = [(engine, flags) for engine in options.engine for flags in ((), ("--no-verify",))]
    taken: dict[Any, list[float]] = {way: [] for way in ways}
    for start in range(options.starts + 1):
        for engine, flags in ways[:: -1 if start % 2 else 1]:
            seconds = _first_byte(options, "--engine", engine, *flags)
            if start:
                taken[engine, flags].append(seconds)
    rows = []
    for (engine, flags), seconds in taken.items():
        title = " ".join([f"{engine}: predict", *flags])
        what = f"{title}, start to first token"
        rows.append(middle(f"{what}, median of {options.starts}", seconds, "s", 0.5))
        rows.append(Row(f"{what}, best", min(seconds), "s"))
    return rows


def _first_byte(options: argparse.Namespace, *flags: str) -> float:
    """Seconds from the start of `edgetune predict` to the first byte that it prints."""
    command = [sys.executable, "-m", "edgetune", "predict", str(options.bundle), options.text]
    command += ["--max-new-tokens", "8", "--threads", str(options.threads), *flags]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise SystemExit("edgetune predict printed nothing")
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds
