"""Training speed beside TRL's trainers and transformers' Trainer: same rows, batch size, rate,
threads; a table, then one JSON line.

    python benchmarks/training.py sft --data $EDGETUNE_DATASETS/e2e_nlg/train.jsonl.gz --held-out
    $EDGETUNE_DATASETS/e2e_nlg/dev.jsonl.gz python benchmarks/training.py classification --data
    $EDGETUNE_DATASETS/banking77/train.jsonl.gz python benchmarks/training.py dpo --data
    $EDGETUNE_DATASETS/instruct_mix/llmfs_preference_politeness.jsonl.gz --rows 200

Each trainer is a process of its own that trains on; they take turns, so that a machine that drifts
drifts for all. `--held-out` (sft only) is a file of rows that none trains on. Heads start at
random. Real tokens are counted, padding is not, and a prompt once for each of its answers. The
first turn warms up; for dpo the reference's answers are part of it (TRL:
`precompute_ref_log_probs`). `held-out loss` is measured by the same fp32 code on the same rows
after the same number of steps. bf16 autocast for all, or with `--precision fp32` none; the peers
once more with `group_by_length` where they have it. `peak` is a matrix product of the model's
shapes, measured in the same turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from training_worker import WORK, prepared, train_theirs

TRAINERS = {
    "sft": ("edgetune", "trl", "trainer", "trainer, grouped by length"),
    "classification": ("edgetune", "trainer", "trainer, grouped by length"),
    "dpo": ("edgetune", "trl"),
}
# forward, and the gradient of the input: frozen weights need no gradient of their own
FLOPS_A_PARAMETER = 4


class Worker:
    """A trainer in its own process."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        arguments = [
            f"--{key.replace('_', '-')}={value}"
            for key, value in vars(options).items()
            if value is not None and key not in {"task", "worker"}
        ]
        self.process = subprocess.Popen(
            [sys.executable, __file__, options.task, f"--worker={name}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self) -> dict[str, Any]:
        """Let it go on, and wait for its report."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.report()

    def report(self) -> dict[str, Any]:
        """The next line for us; its other output passes by."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                facts: dict[str, Any] = json.loads(line[1:])
                return facts
        raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}")


def compare(options: argparse.Namespace) -> None:
    """Turns of `steps` steps each; the table; the JSON line."""
    names = [*TRAINERS[options.task]]
    if options.only:
        names = [name for name in names if name in options.only.split(";")]
    workers = {name: Worker(name, options) for name in names}
    ceiling = Worker("multiply", options)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    peaks: list[float] = []
    for round_ in range(options.rounds):
        for name, worker in workers.items():
            turns[name].append(worker.turn())
            print(
                f"turn {round_ + 1}/{options.rounds}  {name}:"
                f" {turns[name][-1]['tokens'] / turns[name][-1]['seconds']:.0f} tok/s",
                file=sys.stderr,
            )
        peaks.append(ceiling.turn()["gflops"])
    ends = {name: worker.turn() for name, worker in workers.items()}
    peak = statistics.median(peaks)
    speeds = {
        name: statistics.median(turn["tokens"] / turn["seconds"] for turn in turns[name][1:])
        for name in names
    }
    limit = peak * 1e9 / (FLOPS_A_PARAMETER * matrix_parameters(options))
    print(
        f"matrix products alone: {peak:.0f} GFLOP/s in {options.precision}, {limit:.0f} tok/s for"
        " this model\n"
    )
    print(
        "| trainer | real tok/s | edgetune's ratio | of the peak | loss, first turn | last turn |"
        " held-out loss | peak MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        held = ends[name]["held_out"]
        print(
            f"| {name} | {speeds[name]:.0f} | {speeds[names[0]] / speeds[name]:.2f} |"
            f" {speeds[name] / limit:.0%} | {turns[name][0]['loss']:.3f} |"
            f" {turns[name][-1]['loss']:.3f} | {'–' if held is None else f'{held:.4f}'} |"
            f" {ends[name]['mb']:.0f} |"
        )
    print(
        json.dumps(
            {
                "benchmark": "training",
                "task": options.task,
                "tokens_per_second": speeds,
                "turns": turns,
                "ends": ends,
                "peak_gflops": peak,
            }
        )
    )


def matrix_parameters(options: argparse.Namespace) -> float:
    """Weights that a token is multiplied with, once each (the output projection for the labelled
    tokens only).
    """
    if options.task == "classification":
        return 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    return 30 * layer + 49152 * 576 * labelled_share(options)


def labelled_share(options: argparse.Namespace) -> float:
    """The share of the first 500 rows' tokens that carry loss."""
    from edgetune.data.batching import IGNORE

    rows = prepared(options)[3].train[:500]
    pairs = [
        (row.rejected_labels, row.rejected_ids) for row in rows if hasattr(row, "rejected_ids")
    ]
    parts = [*((row.labels, row.input_ids) for row in rows), *pairs]
    return sum(sum(label != IGNORE for label in labels) for labels, _ in parts) / sum(
        len(ids) for _, ids in parts
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=tuple(TRAINERS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--columns", default="mr,ref", help="sft: of the prompt, of the answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rows", type=int, default=4000, help="of the data, at most")
    parser.add_argument("--steps", type=int, default=10, help="steps in a turn")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", help="some of the trainers, with ; between them")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.held_out is not None and options.task != "sft":
        parser.error("--held-out is for sft")
    (compare if options.worker is None else WORK.get(options.worker, train_theirs))(options)


if __name__ == "__main__":
    main()
