"""Decode and prefill speed of a bundle beside its peers, interleaved in one run; a table, then one
JSON line.

    python benchmarks/decode.py --bundle BUNDLE [--adapter NAME]
                                [--genai-python PYTHON [--genai FOLDER]]
                                [--llama FILE.gguf --llama-python PYTHON]

With --genai-python also the bundle itself in onnxruntime-genai, with and without the adapter: the
same weights in both engines; with --genai its own int4 in FOLDER, too.

Every engine is a worker process of its own, loaded once and asked in turns, so that a drifting
machine hits all alike. A round is one prompt (256 tokens) and greedy tokens (128), batch 1. Medians
over rounds; memory is the worker's peak. Peers live in their own virtual environments
(`benchmarks/peers.toml` pins them).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

Round = Callable[
    [], tuple[float, float]
]  # → seconds to the first token, seconds for the other tokens


class Work(NamedTuple):
    """What a round asks for, in tokens."""

    prompt: int
    new: int
    vocabulary: int

    def ids(self) -> list[int]:
        """The same pseudo-random prompt everywhere."""
        return [100 + (i * 7919) % min(40000, self.vocabulary - 100) for i in range(self.prompt)]


def edgetune_rounds(
    bundle: str, adapter: str, threads: int, work: Work, *, engine: str, rows: int = 1
) -> Round:
    """Our runtime's decoder engine, adapter bound or not; `rows` streams at once, all with the
    adapter, each in a binding of its own.
    """
    from edgetune.runtime import Runtime

    runtime = Runtime.open(bundle, threads=threads, verify=False, engine=engine)
    bound = [runtime.bound(adapter) if adapter else None] * rows
    decoder = runtime.opened.need_decoder()
    if rows > 1 and adapter:
        from edgetune.runtime.adapters.packing import pack_adapter

        folder = Path(bundle) / "adapters" / adapter
        tensors = pack_adapter(folder, runtime.manifest).tensors
        bound = [decoder.bind(tensors) for _ in range(rows)]

    def once() -> tuple[float, float]:
        start = time.perf_counter()
        state, logits = decoder.start([work.ids()] * rows, bound, capacity=work.prompt + work.new)
        tokens = logits.argmax(-1).tolist()
        first = time.perf_counter()
        for _ in range(work.new - 1):
            tokens = state.step(tokens).argmax(-1).tolist()
        return (first - start) / rows, (time.perf_counter() - first) / rows

    return once


def genai_rounds(folder: str, adapter: str, threads: int, work: Work) -> Round:
    """onnxruntime-genai's own generator; an adapter is an `.onnx_adapter` file."""
    import onnxruntime_genai as og

    config = og.Config(folder)
    config.overlay(
        json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}})
    )
    model = og.Model(config)
    adapters = og.Adapters(model)
    if adapter:
        adapters.load(adapter, "a")

    def once() -> tuple[float, float]:
        params = og.GeneratorParams(model)
        length = work.prompt + work.new
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        if adapter:
            generator.set_active_adapter(adapters, "a")
        start = time.perf_counter()
        generator.append_tokens(work.ids())
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(work.new - 1):
            generator.generate_next_token()
        return first - start, time.perf_counter() - first

    return once


def llama_rounds(file: str, adapter: str, threads: int, work: Work) -> Round:
    """llama.cpp through llama-cpp-python; an adapter is a GGUF LoRA."""
    import llama_cpp
    import numpy as np
    from llama_cpp import llama_cpp as library

    # Its AMX buffers crash at the first token on a processor that has AMX (0.3.36, Q4_1);
    # repacking, the other extra, is not for Q4_1.
    defaults = library.llama_model_default_params

    def without_extra_buffers() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    library.llama_model_default_params = without_extra_buffers
    model = llama_cpp.Llama(
        file,
        n_ctx=work.prompt + work.new + 8,
        n_threads=threads,
        n_threads_batch=threads,
        lora_path=adapter or None,
        verbose=False,
        logits_all=False,
    )

    def likeliest() -> int:  # `model.scores` holds nothing without logits_all
        logits = llama_cpp.llama_get_logits_ith(model._ctx.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())

    def once() -> tuple[float, float]:
        model.reset()
        start = time.perf_counter()
        model.eval(work.ids())
        token = likeliest()
        first = time.perf_counter()
        for _ in range(work.new - 1):
            model.eval([token])
            token = likeliest()
        return first - start, time.perf_counter() - first

    return once


ENGINES = {
    "native": partial(edgetune_rounds, engine="native"),
    "native_small": partial(edgetune_rounds, engine="native:cache=int8"),
    "native8": partial(edgetune_rounds, engine="native", rows=8),
    "onnxruntime": partial(edgetune_rounds, engine="onnxruntime"),
    "onnxruntime8": partial(edgetune_rounds, engine="onnxruntime", rows=8),
    "genai": genai_rounds,
    "llama": llama_rounds,
}


def worker(engine: str, model: str, adapter: str, threads: int, work: Work) -> None:
    """Load, say so, then run a round for every line read."""
    sys.path.append(str(Path(__file__).parent.parent))  # a peer's environment has no edgetune
    from edgetune.core.memory import peak_rss_mb

    loaded = time.perf_counter()
    once = ENGINES[engine](model, adapter, threads, work)
    print(json.dumps({"load_s": time.perf_counter() - loaded}), flush=True)
    for _ in sys.stdin:
        first, rest = once()
        speeds = {"prefill": work.prompt / first, "decode": (work.new - 1) / rest}
        print(json.dumps({**speeds, "peak_mb": peak_rss_mb()}), flush=True)


def configurations(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """(title, worker command) of everything asked for."""

    from edgetune.runtime.bundle.manifest import read_manifest

    vocabulary = read_manifest(options.bundle).graph.vocab_size
    sizes = [str(n) for n in (options.threads, options.prompt, options.new, vocabulary)]

    def command(python: str, engine: str, model: str, adapter: str = "") -> list[str]:
        return [python, __file__, "--worker", engine, model, adapter, *sizes]

    for engine, title in (("native", "edgetune"), ("onnxruntime", "edgetune by ONNX Runtime")):
        ours = partial(command, sys.executable)
        yield f"{title}, none active", ours(engine, options.bundle)
        if options.adapter:
            active = options.bundle, options.adapter
            yield f"{title}, adapter active", ours(engine, *active)
            yield f"{title}, 8 streams with 8 adapters", ours(f"{engine}8", *active)
    yield "edgetune, cache in 8 bits, none active", ours("native_small", options.bundle)
    if options.genai:
        yield (
            "onnxruntime-genai, its own int4",
            command(options.genai_python, "genai", options.genai),
        )
    if options.genai_python:
        yield (
            "onnxruntime-genai, this bundle",
            command(options.genai_python, "genai", options.bundle),
        )
    if options.genai_python and options.adapter:
        adapter = (
            Path(options.bundle) / "adapters" / options.adapter / f"{options.adapter}.onnx_adapter"
        )
        yield (
            "onnxruntime-genai, this bundle, adapter active",
            command(options.genai_python, "genai", options.bundle, str(adapter)),
        )
    if options.llama:
        yield "llama.cpp", command(options.llama_python, "llama", options.llama)
    if options.llama_adapter:
        yield (
            "llama.cpp, adapter active",
            command(options.llama_python, "llama", options.llama, options.llama_adapter),
        )


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Interleaved rounds → medians by configuration."""
    workers = {}
    for title, command in configurations(options):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        workers[title] = (process, json.loads(_line(process)), [])
    for round_number in range(options.rounds + 1):  # the first is warm-up
        for process, _, rows in workers.values():
            assert process.stdin is not None
            print("go", file=process.stdin, flush=True)
            row = json.loads(_line(process))
            if round_number:
                rows.append(row)
    results = {}
    for title, (process, loaded, rows) in workers.items():
        process.kill()
        middle = {key: statistics.median(row[key] for row in rows) for key in ("prefill", "decode")}
        results[title] = {
            **loaded,
            **middle,
            "peak_mb": rows[-1]["peak_mb"],
            "decode_rounds": [round(row["decode"], 2) for row in rows],
            "prefill_rounds": [round(row["prefill"], 2) for row in rows],
        }
    return results


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    while True:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker stopped: {' '.join(map(str, process.args))}")  # type: ignore[arg-type]
        if line.startswith("{"):
            return line


def plain_reads(bundle: str) -> dict[str, float]:
    """Seconds of one plain read of the native engine's weights, by one thread and by two, medians
    of 30; and what a token reads of them in bytes.
    """
    from edgetune.runtime.bundle.manifest import read_manifest
    from edgetune.runtime.engine.native.decoder import NativeDecoder

    found: dict[str, float] = {}
    for threads in (1, 2):
        model = NativeDecoder(bundle, read_manifest(bundle), threads=threads).model
        found[f"read_s_{threads}"] = statistics.median(model.seconds_to_read() for _ in range(30))
        found["weight_bytes"] = model.sizes.weight_bytes
    return found


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "--worker":
        threads, *sizes = map(int, sys.argv[5:])
        worker(*sys.argv[2:5], threads, Work(*sizes))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--adapter", default="")
    for name in ("genai", "llama", "llama-adapter"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--genai-python", default="")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    before = plain_reads(options.bundle)
    results = measure(options)
    after = plain_reads(options.bundle)
    print(
        f"{'configuration':<48}{'decode tok/s':>14}{'prefill tok/s':>15}{'peak MB':>9}{'load s':>8}"
    )
    for title, row in results.items():
        print(
            f"{title:<48}{row['decode']:>14.1f}{row['prefill']:>15.0f}{row['peak_mb']:>9.0f}{row['load_s']:>8.2f}"
        )
    for label, read in (("before", before), ("after", after)):
        one, two = (read["weight_bytes"] / read[f"read_s_{n}"] / 1e9 for n in (1, 2))
        share = results["edgetune, none active"]["decode"] * read["read_s_2"]
        print(
            f"{label}: a plain read of the {read['weight_bytes'] / 1e6:.1f} MB of weights reaches"
            f" {one:.1f} GB/s by one thread and {two:.1f} by two; a decode step takes"
            f" {1 / share:.2f} times as long as the latter ({share:.0%})"
        )
    print(
        json.dumps(
            {
                "benchmark": "decode",
                "prompt": options.prompt,
                "new": options.new,
                "reads": [before, after],
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
