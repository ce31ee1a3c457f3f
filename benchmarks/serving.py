"""Serving: mixed adapters, swaps, the HTTP layer, cold start, a soak; a table beside the targets,
then one JSON line.

    python benchmarks/serving.py streams --bundle BUNDLE [--adapter FOLDER]
    python benchmarks/serving.py together --bundle BUNDLE
    python benchmarks/serving.py swap --bundle BUNDLE
    python benchmarks/serving.py http --bundle BUNDLE
    python benchmarks/serving.py cold --bundle BUNDLE
   python benchmarks/serving.py llama --bundle BUNDLE --llama FILE.gguf --llama-python PYTHON
    python benchmarks/serving.py soak --bundle BUNDLE --minutes 30

Several sections may be named at once. BUNDLE is a decoder's (`edgetune export`, mode separate). The
adapters are made here, of rank 8 on all linear layers, or out of FOLDER with noise, in a temporary
folder (`--work` names another one). What is compared takes turns in one run, in alternating order,
so that a drifting machine hits all alike; ratios are of one turn each, medians are shown. The first
turn warms up. End tokens are banned, so every answer has all its tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serving_load import (
    Answer,
    Job,
    Prompts,
    Row,
    by_http,
    by_python,
    linked,
    make_adapters,
    memory_mb,
    no_end,
    percentile,
    served,
    table,
)
from serving_soak import soak

from edgetune.core.layout import ADAPTER_WEIGHTS
from edgetune.runtime import Runtime
from edgetune.runtime.engine.batch import Batch
from edgetune.runtime.scheduler.scheduler import Scheduler

STREAMS = 8
median = statistics.median


def speed(answers: Sequence[Answer]) -> float:
    """Tokens/s of a round, prompts included: all tokens by the time until the last one."""
    return sum(answer.tokens for answer in answers) / max(answer.end for answer in answers)


def streams(options: argparse.Namespace, work: Path) -> list[Row]:
    """8 streams of 8 adapters beside 8 streams of one adapter, one stream, and the base model."""
    with Runtime.open(options.bundle, threads=options.threads, adapter_folder=work) as runtime:
        names: list[str | None] = list(
            make_adapters(work, runtime.manifest, STREAMS, source=options.adapter)
        )
        kinds = {
            "one stream": names[:1],
            "8 streams, one adapter": names[:1] * STREAMS,
            "8 streams, 8 adapters": names,
        }
        kinds["8 streams, no adapter"] = [None] * STREAMS
        prompts = Prompts(runtime.manifest.graph.vocab_size)
        whole: dict[str, list[float]] = {kind: [] for kind in kinds}
        steps: dict[str, list[float]] = {kind: [] for kind in kinds}
        with Scheduler(runtime, max_rows=STREAMS) as scheduler:
            for turn in range(options.rounds + 1):
                for kind in list(kinds)[:: -1 if turn % 2 else 1]:
                    before = scheduler.stats()
                    answers = by_python(
                        scheduler,
                        [Job(name, prompts(options.prompt), options.new) for name in kinds[kind]],
                    )
                    after = scheduler.stats()
                    made = (
                        after.tokens_generated_total - before.tokens_generated_total - len(answers)
                    )  # first ones: prefill
                    if turn:
                        whole[kind].append(speed(answers))
                        steps[kind].append(
                            made / (after.step_seconds_total - before.step_seconds_total)
                        )
    mixed, shared, one = "8 streams, 8 adapters", "8 streams, one adapter", "one stream"
    rows = [Row(f"{kind}, with prompts", median(whole[kind]), "tokens/s") for kind in kinds]
    rows += [Row(f"{kind}, engine steps only", median(steps[kind]), "tokens/s") for kind in kinds]
    rows.append(
        Row(
            "8 adapters against one shared, with prompts",
            _ratio(whole, mixed, shared),
            "x",
            0.9,
            at_least=True,
        )
    )
    rows.append(
        Row(
            "8 adapters against one stream, with prompts",
            _ratio(whole, mixed, one),
            "x",
            2.5,
            at_least=True,
        )
    )
    rows.append(
        Row("8 adapters against one shared, engine steps only", _ratio(steps, mixed, shared), "x")
    )
    rows.append(
        Row("8 adapters against one stream, engine steps only", _ratio(steps, mixed, one), "x")
    )
    return rows


def _ratio(rounds: dict[str, list[float]], kind: str, to: str) -> float:
    return median(a / b for a, b in zip(rounds[kind], rounds[to], strict=True))


def together(options: argparse.Namespace, work: Path) -> list[Row]:
    """First tokens of 8 short requests sent at once: one prompt between two steps, or as many as
    128 tokens hold.
    """
    with Runtime.open(options.bundle, threads=options.threads, adapter_folder=work) as runtime:
        names = make_adapters(work, runtime.manifest, STREAMS, source=options.adapter)
        prompts, ways = (
            Prompts(runtime.manifest.graph.vocab_size),
            {"one prompt a turn": options.prompt, "prompts share a turn": 128},
        )
        mean: dict[str, list[float]] = {way: [] for way in ways}
        last: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(options.rounds + 1):
            for way in list(ways)[:: -1 if turn % 2 else 1]:
                with Scheduler(runtime, max_rows=STREAMS, prefill_chunk=ways[way]) as scheduler:
                    answers = by_python(
                        scheduler,
                        [Job(name, prompts(options.prompt), STREAMS + 2) for name in names],
                    )
                if turn:
                    mean[way].append(1e3 * statistics.mean(answer.first for answer in answers))
                    last[way].append(1e3 * max(answer.first for answer in answers))
    return [
        Row(f"time to first token of 8 at once, {what}, {way}", median(of[way]), "ms")
        for what, of in (("mean", mean), ("last", last))
        for way in ways
    ]


def swap(options: argparse.Namespace, work: Path) -> list[Row]:
    """What another adapter costs a request: resident, from disk, and hundreds of them in memory."""
    with Runtime.open(options.bundle, threads=options.threads) as runtime:
        made = make_adapters(work / "made", runtime.manifest, STREAMS + 1, source=options.adapter)
    many = linked(work / "many", work / "made", made, options.adapters)
    limit = options.adapter_memory_mb
    with Runtime.open(
        options.bundle,
        threads=options.threads,
        adapter_folder=work / "many",
        adapter_memory_mb=limit,
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
    with Runtime.open(
        options.bundle, threads=options.threads, adapter_folder=work / "made"
    ) as runtime:
        for name in made:
            runtime.adapter(name)
        return (
            rows
            + _host_rows(runtime, made, options.samples)
            + _request_rows(runtime, made, options.samples // 5)
        )


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


def http(options: argparse.Namespace, work: Path) -> list[Row]:
    """The same load through `edgetune serve` and through the scheduler of this process."""
    library = work / "library"
    with Runtime.open(
        options.bundle, threads=options.threads, adapter_folder=_made(library)
    ) as runtime:
        names = make_adapters(library, runtime.manifest, STREAMS, source=options.adapter)
        prompts, bias = Prompts(runtime.manifest.graph.vocab_size), no_end(runtime)
        flags = (
            "--adapter-library",
            str(library),
            "--threads",
            str(options.threads),
            "--max-rows",
            str(STREAMS),
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
                    opened = ways[way](spread)
                    if turn:
                        whole[way].append(speed(answers))
                        alone[way].append(1e3 * median(firsts))
                        loaded[way].append(1e3 * median(answer.first for answer in opened))
            log = server.errors()
    if log:
        raise SystemExit(f"the server logged errors: {log[0]}")
    lost = [100 * (1 - h / p) for h, p in zip(whole["http"], whole["python"], strict=True)]
    rows = [Row(f"8 streams, 8 adapters, {way}", median(whole[way]), "tokens/s") for way in ways]
    rows.append(Row("tokens/s lost to HTTP", median(lost), "%", 5))
    rows += [
        Row(f"time to first token of a single request, {way}", median(alone[way]), "ms")
        for way in ways
    ]
    rows.append(
        Row(
            "added by HTTP to the first token of a single request",
            median(h - p for h, p in zip(alone["http"], alone["python"], strict=True)),
            "ms",
            3,
        )
    )
    rows += [
        Row(
            f"time to first token, open loop of {options.rate:g} requests/s, {way}",
            median(loaded[way]),
            "ms",
        )
        for way in ways
    ]
    rows.append(
        Row(
            "added by HTTP to the first token, open loop",
            median(h - p for h, p in zip(loaded["http"], loaded["python"], strict=True)),
            "ms",
        )
    )
    return rows


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def cold(options: argparse.Namespace, work: Path) -> list[Row]:
    """`edgetune predict` from the start of the process to the first byte of the answer."""
    rows = []
    for title, flags in (("", ()), (" --no-verify", ("--no-verify",))):
        taken = []
        for _ in range(options.starts + 1):
            start = time.perf_counter()
            command = [
                sys.executable,
                "-m",
                "edgetune",
                "predict",
                str(options.bundle),
                options.text,
                "--max-new-tokens",
                "8",
                "--threads",
                str(options.threads),
            ]
            with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, bufsize=0) as process:
                assert process.stdout is not None
                if not process.stdout.read(1):
                    raise SystemExit("edgetune predict printed nothing")
                taken.append(time.perf_counter() - start)
                process.stdout.read()
        rows.append(
            Row(
                f"predict{title}, start to first token, median of {options.starts}",
                median(taken[1:]),
                "s",
                1.0,
            )
        )
        rows.append(Row(f"predict{title}, start to first token, best", min(taken[1:]), "s", 1.0))
    return rows


def llama(options: argparse.Namespace, work: Path) -> list[Row]:
    """8 streams with 8 adapters beside llama.cpp, which answers them one after the other."""
    from edgetune.export.gguf import export_gguf_adapters

    if not options.llama:
        raise SystemExit(
            "llama: give --llama FILE.gguf, the base as llama.cpp reads it, and --llama-python"
        )
    seconds: list[float] = []
    ours: list[float] = []
    with Runtime.open(options.bundle, threads=options.threads, adapter_folder=work) as runtime:
        names = make_adapters(work, runtime.manifest, STREAMS, source=options.adapter)
        files = export_gguf_adapters(
            [(name, work / name) for name in names],
            work / "gguf",
            base_name=runtime.manifest.base.name,
        )
        command = [
            options.llama_python,
            str(Path(__file__).with_name("serving_llama.py")),
            options.llama,
            str(options.threads),
            *map(str, files),
        ]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert worker.stdin is not None and worker.stdout is not None
        if worker.stdout.readline() != "ready\n":
            raise SystemExit("llama: the worker does not start")
        prompts = Prompts(runtime.manifest.graph.vocab_size)
        with Scheduler(runtime, max_rows=STREAMS) as scheduler:
            for turn in range(options.rounds + 1):
                load = [prompts(options.prompt) for _ in names]
                print(
                    json.dumps({"prompts": load, "new": options.new}), file=worker.stdin, flush=True
                )
                theirs = json.loads(worker.stdout.readline())
                answers = by_python(
                    scheduler,
                    [Job(name, ids, options.new) for name, ids in zip(names, load, strict=True)],
                )
                if turn:
                    seconds.append(theirs)
                    ours.append(speed(answers))
        worker.kill()
    tokens = STREAMS * options.new
    ratio = median(own * theirs / tokens for own, theirs in zip(ours, seconds, strict=True))
    return [
        Row("8 streams, 8 adapters, with prompts: edgetune", median(ours), "tokens/s"),
        Row(
            "the same requests in llama.cpp, one after the other",
            tokens / median(seconds),
            "tokens/s",
        ),
        Row("edgetune against llama.cpp", ratio, "x", 2.0, at_least=True),
    ]


SECTIONS = {
    "streams": streams,
    "together": together,
    "swap": swap,
    "http": http,
    "cold": cold,
    "llama": llama,
    "soak": soak,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="+", choices=SECTIONS)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument(
        "--adapter",
        type=Path,
        help="a PEFT folder of this base; the adapters are made of it (not for soak)",
    )
    parser.add_argument("--work", type=Path, help="folder for adapters and logs; kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--rounds", type=int, default=7, help="streams, http: turns after the first"
    )
    parser.add_argument("--prompt", type=int, default=32, help="streams, http: tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="streams, http: tokens of an answer")
    parser.add_argument("--singles", type=int, default=20, help="http: single requests a turn")
    parser.add_argument("--rate", type=float, default=2.0, help="http: requests/s of the open loop")
    parser.add_argument("--samples", type=int, default=2000, help="swap: switches timed")
    parser.add_argument("--adapters", type=int, default=500, help="swap: adapters registered")
    parser.add_argument(
        "--adapter-memory-mb", type=float, default=200.0, help="swap: limit for resident adapters"
    )
    parser.add_argument("--starts", type=int, default=5, help="cold: starts after the first")
    parser.add_argument(
        "--text", default="Turn on the lights in the kitchen.", help="cold: what is asked"
    )
    parser.add_argument("--llama", default="", help="llama: the base as a GGUF file")
    parser.add_argument(
        "--llama-python", default=sys.executable, help="llama: a Python that has llama-cpp-python"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="soak: how long")
    parser.add_argument("--load", type=float, default=4.0, help="soak: requests/s")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sections:
            rows = SECTIONS[name](options, _made((options.work or Path(folder)) / name))
            results[name] = {row.title: round(row.value, 4) for row in rows}
            print(f"\n## {name}\n\n{table(rows)}\n", flush=True)
    asked = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
    }
    print(json.dumps({"benchmark": "serving", "options": asked, "results": results}))


if __name__ == "__main__":
    main()
