"""What adapters cost a decode step: none, one, and a different one for each row; a table, then one
JSON line.

    python benchmarks/adapter_cost.py --bundle BUNDLE [--plain BUNDLE] [--rows 8] [--threads 1]

One process, one step of each kind in turns, in alternating order, by both engines or those that
`--engine` names. BUNDLE is a decoder's (mode separate); `--plain` is the same base without adapter
inputs (`edgetune export` without adapters and `--mode merged`), for ONNX Runtime, else what is
compared with is BUNDLE with no adapter active. Adapters are made
here: rank 8, all linear layers. On a shared machine read the processor time of one thread, which
waiting does not count in; on an idle one `--clock wall` with both threads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from serving_adapters import make_adapters

from edgetune.runtime import Runtime
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.engine.decoder import DecoderEngine
from edgetune.runtime.engine.interface import AdapterRow, Decoder
from edgetune.runtime.engine.session import BoundTensors

CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}
Step = Callable[[], object]


def stepping(engine: Decoder, adapters: list[AdapterRow], options: argparse.Namespace) -> Step:
    """One decode step of rows that begin with `past` tokens each, again and again."""
    room = (options.rounds + 1) * (options.steps + 1)
    prompts = [
        [100 + (7919 * (k + i)) % 900 for k in range(options.past)] for i in range(len(adapters))
    ]
    state, _ = engine.start(prompts, adapters, capacity=options.past + room + 1)
    tokens = [100 + 7 * i for i in range(len(adapters))]
    return lambda: state.step(tokens)


def measure(steps: dict[str, Step], options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of each step, by kind, in the order they were run."""
    clock = CLOCKS[options.clock]
    taken: dict[str, list[float]] = {kind: [] for kind in steps}
    for turn in range(options.rounds + 1):
        for kind in list(steps)[:: -1 if turn % 2 else 1]:
            steps[kind]()  # what the one before left in the caches is not this one's affair
            for _ in range(options.steps if turn else 0):
                start = clock()
                steps[kind]()
                taken[kind].append(1e3 * (clock() - start))
    return taken


def kinds(
    name: str,
    engine: Decoder,
    plain: Decoder | None,
    made: list[AdapterRow],
    options: argparse.Namespace,
) -> dict[str, Step]:
    """What is compared, of one engine."""
    found: dict[str, Step] = {}
    for rows in (1, options.rows):
        if plain is not None:
            found[f"{name}: {rows} rows, graph without adapter inputs"] = stepping(
                plain, [None] * rows, options
            )
        found[f"{name}: {rows} rows, none active"] = stepping(engine, [None] * rows, options)
        if isinstance(engine, DecoderEngine):
            rank_0 = BoundTensors(engine.empty.tensors)
            rank_0.active = True
            found[f"{name}: {rows} rows, rank 0 through the adapters' nodes"] = stepping(
                engine, [rank_0] * rows, options
            )
        found[f"{name}: {rows} rows, one adapter"] = stepping(engine, made[:1] * rows, options)
    found[f"{name}: {options.rows} rows, {options.rows} adapters"] = stepping(
        engine, [*made], options
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--plain", type=Path)
    parser.add_argument("--engine", nargs="+", default=["native", "onnxruntime"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--past", type=int, default=256, help="tokens in the cache of each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--steps", type=int, default=3, help="of each kind in a turn, after one that is not counted"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        steps: dict[str, Step] = {}
        names: list[str] = []
        for name in options.engine:
            runtime = stack.enter_context(
                Runtime.open(options.bundle, threads=options.threads, engine=name)
            )
            engine = runtime.decoder
            assert engine is not None
            names = names or make_adapters(Path(folder), runtime.manifest, options.rows)
            made: list[AdapterRow] = [
                engine.bind(pack_adapter(Path(folder) / name, runtime.manifest).tensors)
                for name in names
            ]
            plain = None
            if options.plain and name == "onnxruntime":
                plain = Runtime.open(options.plain, threads=options.threads, engine=name).decoder
            steps |= kinds(name, engine, plain, made, options)
        taken = measure(steps, options)
    print(
        "| decode step | fastest, ms | lower quartile | median | against the first of as many rows"
        " |\n|---|---|---|---|---|"
    )
    results = {}
    for kind, times in taken.items():
        first = next(other for other in taken if other.split()[:2] == kind.split()[:2])
        low, middle, ratio = (
            float(np.percentile(times, 25)),
            statistics.median(times),
            float(np.percentile(times, 25) / np.percentile(taken[first], 25)),
        )
        results[kind] = {
            "fastest": min(times),
            "lower_quartile": low,
            "median": middle,
            "ratio": ratio,
        }
        print(f"| {kind} | {min(times):.2f} | {low:.2f} | {middle:.2f} | {ratio:.3f} |")
    mixed_over_shared = {}
    for name in options.engine:
        shared, mixed = (
            results[f"{name}: {options.rows} rows, {what}"]["lower_quartile"]
            for what in ("one adapter", f"{options.rows} adapters")
        )
        mixed_over_shared[name] = shared / mixed
        print(
            f"\n{name}: {options.rows} adapters against one shared: {shared / mixed:.3f} of the"
            " tokens a second (engine steps only)"
        )
    asked = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
    }
    print(
        json.dumps(
            {
                "benchmark": "adapter_cost",
                "options": asked,
                "results": results,
                "mixed_over_shared": mixed_over_shared,
            }
        )
    )


if __name__ == "__main__":
    main()
