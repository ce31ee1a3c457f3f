"""Serving: mixed adapters, swaps, the HTTP layer, cold start, a soak; a table beside the targets,
then one JSON line.

    python benchmarks/serving.py streams --bundle BUNDLE [--adapter FOLDER]
    python benchmarks/serving.py together --bundle BUNDLE
    python benchmarks/serving.py swap --bundle BUNDLE
    python benchmarks/serving.py http --bundle BUNDLE
    python benchmarks/serving.py cold --bundle BUNDLE
    python benchmarks/serving.py llama --bundle BUNDLE --llama FILE.gguf --llama-python PYTHON
    python benchmarks/serving.py soak --bundle BUNDLE --minutes 30

Several sections may be named at once; all but `soak` are run by both engines, or by the one that
`--engine` names. BUNDLE is a decoder's (`edgetune export`, mode separate). The
adapters are made here, of rank 8 on all linear layers, or out of FOLDER with noise, in a temporary
folder (`--work` names another one). What is compared takes turns in one run, in alternating order,
so that a drifting machine hits all alike; ratios are of one turn each, medians are shown. The first
turn warms up. End tokens are banned, so every answer has all its tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from serving_adapters import make_adapters
from serving_http import cold, http
from serving_load import STREAMS, Job, Prompts, Row, by_python, made, middle, opened, speed, table
from serving_soak import soak
from serving_swap import swap

from edgetune.runtime.scheduler.scheduler import Scheduler

median = statistics.median
Section = Callable[[argparse.Namespace, Path], list[Row]]


def streams(options: argparse.Namespace, work: Path) -> list[Row]:
    """8 streams of 8 adapters beside 8 streams of one adapter, one stream, and the base model; the
    engines take turns.
    """
    with contextlib.ExitStack() as stack:
        made_of: list[str] = []
        schedulers = {}
        for engine in options.engine:
            runtime = stack.enter_context(opened(_with(options, engine), work))
            made_of = made_of or make_adapters(
                work, runtime.manifest, STREAMS, source=options.adapter
            )
            schedulers[engine] = stack.enter_context(Scheduler(runtime, max_rows=STREAMS))
        names: list[str | None] = [*made_of]
        kinds = {
            "one stream": names[:1],
            "8 streams, one adapter": names[:1] * STREAMS,
            "8 streams, 8 adapters": names,
            "8 streams, no adapter": [None] * STREAMS,
        }
        prompts = Prompts(runtime.manifest.graph.vocab_size)
        ways = [(engine, kind) for engine in schedulers for kind in kinds]
        whole: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        steps: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        for turn in range(options.rounds + 1):
            for engine, kind in ways[:: -1 if turn % 2 else 1]:
                scheduler = schedulers[engine]
                before = scheduler.stats()
                answers = by_python(
                    scheduler,
                    [Job(name, prompts(options.prompt), options.new) for name in kinds[kind]],
                )
                after = scheduler.stats()
                new = after.tokens_generated_total - before.tokens_generated_total - len(answers)
                if turn:  # new: without the first ones, which are prefill's
                    whole[engine, kind].append(speed(answers))
                    seconds = after.step_seconds_total - before.step_seconds_total
                    steps[engine, kind].append(new / seconds)
    return [row for engine in schedulers for row in _stream_rows(engine, list(kinds), whole, steps)]


Rounds = dict[tuple[str, str], list[float]]


def _stream_rows(engine: str, kinds: Sequence[str], whole: Rounds, steps: Rounds) -> list[Row]:
    """Tokens/s of each kind by one engine, and what eight adapters take."""
    one, shared, mixed = ((engine, kind) for kind in kinds[:3])
    rows = [
        middle(f"{engine}: {kind}, {what}", of[engine, kind], "tokens/s")
        for what, of in (("with prompts", whole), ("engine steps only", steps))
        for kind in kinds
    ]
    for what, of, targets in (
        ("with prompts", whole, (0.9, 2.5)),
        ("engine steps only", steps, (None, None)),
    ):
        for beside, to, target in zip(
            (shared, one), ("one shared", "one stream"), targets, strict=True
        ):
            title = f"{engine}: 8 adapters against {to}, {what}"
            rows.append(middle(title, _ratios(of, mixed, beside), "x", target, at_least=True))
    return rows


def _ratios(rounds: Rounds, kind: tuple[str, str], to: tuple[str, str]) -> list[float]:
    return [a / b for a, b in zip(rounds[kind], rounds[to], strict=True)]


def together(options: argparse.Namespace, work: Path) -> list[Row]:
    """First tokens of 8 short requests sent at once: one prompt between two steps, or as many as
    128 tokens hold.
    """
    with opened(options, work) as runtime:
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
        middle(f"time to first token of 8 at once, {what}, {way}", of[way], "ms")
        for what, of in (("mean", mean), ("last", last))
        for way in ways
    ]


def llama(options: argparse.Namespace, work: Path) -> list[Row]:
    """8 streams with 8 adapters beside llama.cpp, which answers them one after the other."""
    from edgetune.export.gguf import export_gguf_adapters

    if not options.llama:
        raise SystemExit(
            "llama: give --llama FILE.gguf, the base as llama.cpp reads it, and --llama-python"
        )
    seconds: list[float] = []
    ours: list[float] = []
    with opened(options, work) as runtime:
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
                took = json.loads(worker.stdout.readline())
                answers = by_python(
                    scheduler,
                    [Job(name, ids, options.new) for name, ids in zip(names, load, strict=True)],
                )
                if turn:
                    seconds.append(took)
                    ours.append(speed(answers))
        worker.kill()
    tokens = STREAMS * options.new
    theirs = [tokens / one for one in seconds]
    ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
    return [
        middle("8 streams, 8 adapters, with prompts: edgetune", ours, "tokens/s"),
        middle("the same requests in llama.cpp, one after the other", theirs, "tokens/s"),
        middle("edgetune against llama.cpp", ratios, "x", 2.0, at_least=True),
    ]


def by_each_engine(section: Section) -> Section:
    """The section once an engine, in a folder of its own; its name stands before each row."""

    def rows(options: argparse.Namespace, work: Path) -> list[Row]:
        return [
            replace(row, title=f"{engine}: {row.title}")
            for engine in options.engine
            for row in section(_with(options, engine), made(work / engine))
        ]

    return rows


def _with(options: argparse.Namespace, engine: str) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), "engine": [engine]})


SECTIONS = {
    "streams": streams,
    "together": by_each_engine(together),
    "swap": by_each_engine(swap),
    "http": by_each_engine(http),
    "cold": cold,
    "llama": by_each_engine(llama),
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
    parser.add_argument(
        "--engine",
        action="append",
        choices=("native", "onnxruntime"),
        help="one of them; not set: both (soak: the one that edgetune chooses)",
    )
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
    options.engine = options.engine or ["native", "onnxruntime"]
    results: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sections:
            rows = SECTIONS[name](options, made((options.work or Path(folder)) / name))
            results[name] = {row.title: round(row.value, 4) for row in rows}
            found += [{"section": name, **asdict(row)} for row in rows]
            print(f"\n## {name}\n\n{table(rows)}\n", flush=True)
    asked = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
    }
    print(json.dumps({"benchmark": "serving", "options": asked, "results": results, "rows": found}))


if __name__ == "__main__":
    main()
