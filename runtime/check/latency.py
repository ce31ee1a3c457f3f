"""Latency and memory of bundles, each in a fresh process, side by side: `python -m
edgetune.runtime.check.latency`.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetune.core.errors import BundleError, EdgetuneError
from edgetune.core.memory import peak_rss_mb
from edgetune.core.tasks import CLASSIFICATION, REWARD, TAGGING
from edgetune.devices.host import usable_cores
from edgetune.runtime.check.machine import (
    EnergyMeter,
    Yardstick,
    busy_neighbours,
    conditions,
    notes_of,
)
from edgetune.runtime.check.verdict import summary

if TYPE_CHECKING:
    from edgetune.runtime.tasks.runtime import Runtime

TIMES = ("ttft_ms", "tpot_ms", "request_ms")
"""What a request's times are called: of decoders the first two, of encoders and scores the last."""
MOST_WARM_UP = 10
"""Requests of an adapter before it is measured, at most: as many as it takes until two in turn
differ by less than `STEADY`."""
STEADY = 0.05
SWAPS = 50


@dataclass(frozen=True)
class Workload:
    """What is measured: each adapter in turn, `runs` times, on synthetic token ids (a fixed
    seed).
    """

    bundle: str
    adapters: tuple[str, ...] = ()
    """empty: the base model without adapter"""
    threads: int | None = None
    runs: int = 20
    prompt_tokens: int = 256
    new_tokens: int = 32
    providers: tuple[str, ...] = ()
    """execution providers in order of preference; empty: the CPU"""
    engine: str = "auto"
    beside: int = 0
    """busy processes next to it"""
    batch: int = 1
    """rows at once: prompts that are read together, answers that are written together"""


def measure_latency(workload: Workload) -> dict[str, Any]:
    """Run the workload in a fresh process; times in ms, memory and size in MB (10⁶ bytes), raw
    samples included.

    Any EdgetuneError of the child is raised here again; BundleError when it dies without one.
    """
    command = [sys.executable, "-m", "edgetune.runtime.check.latency", json.dumps(asdict(workload))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise EdgetuneError(
            f"\n{done.stderr}".partition("\nedgetune: ")[2].strip()
        )  # log lines may stand before it
    if done.returncode:
        reason = f"signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BundleError(
            f"the measuring process ended with {reason}: {last}", where=workload.bundle
        )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure_here(workload: Workload) -> dict[str, Any]:
    """The same in this process."""
    from edgetune.runtime.tasks.runtime import Runtime

    start = time.perf_counter()
    with (
        busy_neighbours(workload.beside),
        Runtime.open(
            workload.bundle,
            threads=workload.threads,
            providers=workload.providers,
            engine=workload.engine,
        ) as runtime,
    ):
        load_ms = (time.perf_counter() - start) * 1e3
        adapter_load_ms = {
            name: _timed_ms(partial(runtime.adapter, name)) for name in workload.adapters
        }
        names: list[str | None] = list(workload.adapters) or [None]
        runs: dict[str | None, list[dict[str, list[float]]]] = {name: [] for name in names}
        beside: dict[str | None, list[dict[str, float]]] = {name: [] for name in names}
        warmed = {name: _warm_up(runtime, name, workload) for name in names}
        peak_mb = peak_rss_mb()
        yardstick = Yardstick(workload.threads or usable_cores())
        before, meter = conditions(yardstick), EnergyMeter()
        for i in range(
            workload.runs
        ):  # in turn, so that a slow moment of the machine hits all alike
            for name in names:
                beside[name].append(yardstick.times())
                runs[name].append(time_request(runtime, name, workload, seed=i))
                meter.look()
        joules, after = meter.joules(), conditions(yardstick)
        yardstick.close()
        swap_ms = _swaps(runtime, names)
        providers, engine = runtime.providers, str(runtime.engine)
        work = work_facts(runtime, workload)
    samples = [
        {
            "adapter": name,
            **{key: [run[key] for run in rows] for key in rows[0]},
            "yardstick": {job: [at[job] for at in beside[name]] for job in beside[name][0]},
        }
        for name, rows in runs.items()
    ]
    return {
        "engine": engine,
        "work": work,
        "providers": {
            "in_use": list(providers.names),
            "nodes": dict(providers.nodes),
            "notes": list(providers.notes),
        },
        "load_ms": load_ms,
        "adapter_load_ms": adapter_load_ms,
        "peak_rss_mb": peak_mb,
        "bundle_mb": bundle_size(Path(workload.bundle)) / 1e6,
        "adapters": [summaries(row) for row in samples],
        "machine": {
            "before": asdict(before),
            "after": asdict(after),
            "notes": notes_of(before, after),
            "warm_up": {name or "": count for name, count in warmed.items()},
            "energy": _energy(meter, joules, workload, len(names)),
        },
        "swap_ms": summary([swap_ms]) if swap_ms else None,
        "samples": {"runs": samples, "swap_ms": swap_ms},
    }


def work_facts(runtime: Runtime, workload: Workload) -> dict[str, int]:
    """What a request's bytes and operations follow from: tokens of its prompts, how many of
    them, weights that a token is multiplied with, their bytes, and bytes of keys and values a
    token.
    """
    manifest, graph = runtime.manifest, runtime.manifest.graph
    file = manifest.files.get(graph.data or graph.engine)
    weights, size = manifest.base.parameters, 0 if file is None else file.bytes
    if not manifest.is_decoder:  # of the table of tokens only a row a token is read
        share = 1 - graph.vocab_size * graph.hidden_size / max(1, weights)
        weights, size = int(weights * max(0.0, share)), int(size * max(0.0, share))
    number = 2 if graph.cache_dtype == "float16" else 4
    heads = (graph.layers or 0) * (graph.kv_heads or 0) * (graph.head_dim or 0)
    return {
        "prompt_tokens": _prompt_tokens(runtime, workload),
        "batch": workload.batch,
        "weights": weights,
        "weight_bytes": size,
        "layers": graph.layers or 0,
        "hidden_size": graph.hidden_size,
        "cache_bytes_a_token": 2 * number * heads,
    }


def _prompt_tokens(runtime: Runtime, workload: Workload) -> int:
    """As many as asked for, if the graph takes them."""
    decoder = runtime.manifest.is_decoder
    room = runtime.manifest.graph.max_length - (workload.new_tokens if decoder else 0)
    return max(1, min(workload.prompt_tokens, room))


def bundle_size(folder: Path) -> int:
    """Bytes of every file in the bundle."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def synthetic_ids(count: int, vocab_size: int, *, avoid: Sequence[int], seed: int) -> list[int]:
    """Random ids without special ones: time does not depend on which tokens they are."""
    allowed = np.setdiff1d(np.arange(vocab_size), np.array(list(avoid), np.int64))
    return [int(i) for i in np.random.default_rng(abs(seed)).choice(allowed, count)]


def time_request(
    runtime: Runtime, name: str | None, workload: Workload, *, seed: int
) -> dict[str, list[float]]:
    """One request: TTFT and the time of each further token, or the time of one encoder call or one
    score; ms.
    """
    graph, tokenizer = runtime.manifest.graph, runtime.tokenizer
    count = _prompt_tokens(runtime, workload)
    rows = [
        synthetic_ids(count, graph.vocab_size, avoid=sorted(tokenizer.eos_token_ids), seed=at)
        for at in range(seed, seed + workload.batch)
    ]
    bound = [runtime.bound(name)] * workload.batch
    start = time.perf_counter()
    if not runtime.manifest.is_decoder:
        encoder = runtime.opened.need_encoder()
        ask = encoder.tokens if runtime.task(name) == TAGGING else encoder.run
        ask(rows, bound, pad_token_id=tokenizer.pad_token_id)
        return {"request_ms": [(time.perf_counter() - start) * 1e3]}
    decoder = runtime.opened.need_decoder()
    if runtime.task(name) in (CLASSIFICATION, REWARD):
        from edgetune.runtime.tasks.scoring import read_scores

        read_scores(decoder, rows, bound)
        return {"request_ms": [(time.perf_counter() - start) * 1e3]}
    state, logits = decoder.start(rows, bound, capacity=count + workload.new_tokens)
    tokens = [int(row.argmax()) for row in logits]
    times = [time.perf_counter()]
    for _ in range(min(workload.new_tokens - 1, state.limit - count)):
        tokens = [int(row.argmax()) for row in state.step(tokens)]
        times.append(time.perf_counter())
    return {"ttft_ms": [(times[0] - start) * 1e3], "tpot_ms": (np.diff(times) * 1e3).tolist()}


def _warm_up(runtime: Runtime, name: str | None, workload: Workload) -> int:
    """Requests until two in turn take the same time, at most `MOST_WARM_UP`; how many."""
    before = math.inf
    for count in range(1, MOST_WARM_UP + 1):
        took = sum(map(sum, time_request(runtime, name, workload, seed=0).values()))
        if abs(took - before) < STEADY * took:
            return count
        before = took
    return MOST_WARM_UP


def _energy(
    meter: EnergyMeter, joules: float | None, workload: Workload, adapters: int
) -> dict[str, Any]:
    """Joules a request and a token, yardstick and idling between included; and where from."""
    if joules is None:
        return {"source": None}
    answers = workload.runs * adapters * workload.batch
    return {
        "source": meter.source,
        "joules_per_request": joules / answers,
        "joules_per_token": joules / answers / workload.new_tokens,
    }


def _swaps(runtime: Runtime, names: Sequence[str | None]) -> list[float]:
    """Times, in ms, to bind another resident adapter's tensors for the next request."""
    opened = runtime.opened
    engine = opened.need_decoder() if opened.manifest.is_decoder else opened.need_encoder()
    if runtime.manifest.mode == "merged" or not runtime.manifest.sites:
        return []
    bound = [runtime.bound(name) for name in {*names, None}]
    swap = engine.swapper()
    return [_timed_ms(partial(swap, bound[i % len(bound)])) for i in range(SWAPS)]


def summaries(row: dict[str, Any]) -> dict[str, Any]:
    """Percentiles of one adapter's samples."""
    figures = {key: summary(row[key]) for key in TIMES if any(row.get(key, []))}
    if "tpot_ms" in figures:
        figures["tokens_per_s"] = {"p50": 1e3 / figures["tpot_ms"]["p50"]}
    return {"adapter": row["adapter"], **figures}


def _timed_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """The child process: workload on the command line, result as JSON on stdout."""
    values = json.loads(sys.argv[1])
    try:
        result = measure_here(
            Workload(
                **{**values, **{name: tuple(values[name]) for name in ("adapters", "providers")}}
            )
        )
    except EdgetuneError as error:
        sys.stderr.write(f"edgetune: {error}\n")
        sys.exit(2)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
