"""What an adapter loses when it is made small; a table, then one JSON line.

    python benchmarks/small_adapters.py --run RUN [--run RUN]… [--form RANK,BITS,STEPS]…
                                        [--rows N] [--data FILE] [--bundle BUNDLE]

Every run is measured as trained and in every form (the rank that takes as many numbers everywhere,
bits, and steps of training against the codes), in torch, by its task metric. The forms are the same
for all runs, so that the rows choose nothing. `--data`: rows instead of the recipe's validation
rows. `--bundle` (a decoder's) instead measures what the forms of the first run, not trained, take
in the native engine: memory of one adapter, the peak of loading it, and a decode step of one thread
in the thread's own processor time, the forms in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from edgetune.compression.measure import TaskMetric
from edgetune.compression.search import Search, SizeTrial, sizes_of
from edgetune.core.layout import ADAPTER, ADAPTER_WEIGHTS
from edgetune.core.memory import peak_rss_mb, reset_peak_rss
from edgetune.core.progress import Progress
from edgetune.export.inputs.small_adapter import read_whole, small_adapter, write_small
from edgetune.runtime import Runtime

FORMS = ("2,3,0", "2,3,100")


def measure(run: Path, forms: list[str], options: argparse.Namespace) -> list[SizeTrial]:
    """One run: as trained (bits 32), then in every form."""
    folder, progress = run / ADAPTER, Progress()
    read = read_whole(folder)
    task = TaskMetric(folder, rows=options.rows, data=options.data, say=progress.say)
    search = Search(read, task, max_loss=None, steps=0, progress=progress)
    assert search.reference is not None
    size = (folder / ADAPTER_WEIGHTS).stat().st_size
    found = [SizeTrial(read.rank, 32, size, 1.0, 0, search.reference.value, 0.0)]
    for form in forms:
        rank, bits, steps = form.split(",")
        size_of_form = sizes_of(read, rank=float(rank), bits=int(bits))[0]
        found.append(search.tried(size_of_form, steps=int(steps)))
    return found


def steps_of(bundle: Path, run: Path, forms: list[str]) -> dict[str, dict[str, float]]:
    """Form → bytes in memory, peak MB of loading it, and quartiles of a decode step in ms."""
    read = read_whole(run / ADAPTER)
    found: dict[str, dict[str, float]] = {"none": {}, "as trained": {}}
    with (
        tempfile.TemporaryDirectory() as work,
        Runtime.open(bundle, threads=1, engine="native", verify=False) as runtime,
    ):
        folders = {"as trained": run / ADAPTER}
        for form in forms:
            rank, bits, _ = form.split(",")
            size = sizes_of(read, rank=float(rank), bits=int(bits))[0]
            folders[form] = Path(work) / form
            write_small(small_adapter(read, size.factors, size.bits), folders[form])
        for name, folder in folders.items():
            reset_peak_rss()
            before = peak_rss_mb()
            runtime.load_adapter(name, folder)
            nbytes = runtime.opened.registry.get(name).nbytes
            found[name] = {"bytes": nbytes, "peak_mb": peak_rss_mb() - before}
        decoder = runtime.opened.need_decoder()
        bound = {name: None if name == "none" else runtime.bound(name) for name in found}
        states = {
            name: decoder.start([list(range(100, 164))], [own], capacity=1000)[0]
            for name, own in bound.items()
        }
        taken: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(60):
            for name in list(found)[:: -1 if turn % 2 else 1]:
                states[name].step([100])  # the caches are its own again
                for _ in range(4):
                    start = time.thread_time()
                    states[name].step([100 + turn])
                    taken[name].append(1e3 * (time.thread_time() - start))
    for name, times in taken.items():
        quartiles = statistics.quantiles(times, n=4)
        found[name] |= {"lower_ms": quartiles[0], "median_ms": quartiles[1]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="append", required=True, type=Path)
    parser.add_argument("--form", action="append")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bundle", type=Path)
    options = parser.parse_args()
    forms = options.form or list(FORMS)
    if options.bundle is not None:
        costs = steps_of(options.bundle, options.run[0], forms)
        for name, one in costs.items():
            over = one["lower_ms"] / costs["none"]["lower_ms"] - 1
            memory = f"{one.get('bytes', 0):>11,.0f} bytes"
            peak = f"peak of loading {one.get('peak_mb', 0):5.1f} MB"
            print(f"{name:<12}{memory}, {peak}, step {one['lower_ms']:.2f} ms ({over:+.1%})")
        print(json.dumps(costs))
        return
    runs = {run.name: measure(run, forms, options) for run in options.run}
    print(f"{'run':<14}{'rank':>6}{'bits':>6}{'steps':>7}{'bytes':>12}{'ΔW kept':>9}{'metric':>9}")
    for name, trials in runs.items():
        for one in trials:
            print(
                f"{name:<14}{one.rank:>6.3g}{one.bits:>6}{one.steps:>7}{one.bytes:>12,}"
                f"{one.kept:>9.1%}{one.metric:>9.4f}"
            )
    for form in range(len(forms) + 1):
        metrics = [trials[form].metric or 0.0 for trials in runs.values()]
        name = forms[form - 1] if form else "as trained"
        print(f"mean of {name}: {statistics.mean(metrics):.4f}")
    print(json.dumps({name: [asdict(one) for one in trials] for name, trials in runs.items()}))


if __name__ == "__main__":
    main()
