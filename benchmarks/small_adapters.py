"""What an adapter loses when it is made small; a table, then one JSON line.

    python benchmarks/small_adapters.py --run RUN [--run RUN]… [--form RANK,BITS,STEPS]…
                                        [--rows N] [--data FILE]

Every run is measured as trained and in every form (the rank that takes as many numbers everywhere,
bits, and steps of training against the codes), in torch, by its task metric. The forms are the same
for all runs, so that the rows choose nothing. `--data`: rows instead of the recipe's validation
rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path

from edgetune.compression.measure import TaskMetric
from edgetune.compression.search import Search, SizeTrial, sizes_of
from edgetune.core.layout import ADAPTER, ADAPTER_WEIGHTS
from edgetune.core.progress import Progress
from edgetune.export.inputs.small_adapter import read_whole

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="append", required=True, type=Path)
    parser.add_argument("--form", action="append")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    forms = options.form or list(FORMS)
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
