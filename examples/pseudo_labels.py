"""Labels for texts that have none, from adapters trained on the few that do: self-training for classifiers.

    python examples/pseudo_labels.py BUNDLE unlabelled.jsonl.gz labelled.jsonl.gz out.jsonl [--least 0.8] [--copies 3]

Every adapter of the bundle (train several seeds of one recipe) gives each text its probabilities, and their mean counts.
A text joins with its likeliest label where that has `--least`; the labelled rows come first, `--copies` times. Of the
unlabelled file only the column `text` is read. Rows: {"text", "label"}.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def pseudo_labels(texts: Sequence[str], scores: Sequence[Sequence[dict[str, float]]], *, least: float) -> list[Row]:
    """Rows of the texts whose likeliest label has a mean probability of `least`; `scores` holds, per adapter, every text's."""
    rows = []
    for text, each in zip(texts, zip(*scores, strict=True), strict=True):
        mean = {label: sum(one[label] for one in each) / len(each) for label in each[0]}
        label = max(mean, key=lambda name: mean[name])
        if mean[label] >= least:
            rows.append({"text": text, "label": label})
    return rows


def read(path: Path) -> list[Row]:
    """The rows of a .jsonl or .jsonl.gz file."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main() -> None:
    """Command line."""
    from edgetune.runtime import Runtime

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("unlabelled", type=Path)
    parser.add_argument("labelled", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--least", type=float, default=0.8, help="mean probability that a label needs")
    parser.add_argument("--copies", type=int, default=3, help="times that the labelled rows are written")
    options = parser.parse_args()
    labelled = [{"text": row["text"], "label": row["label"]} for row in read(options.labelled)]
    known = {row["text"] for row in labelled}
    texts = [row["text"] for row in read(options.unlabelled) if row["text"] not in known]
    with Runtime.open(options.bundle) as runtime:
        scores = [[found.scores for found in runtime.classify(texts, name, truncate=True)] for name in runtime.adapters]
    made = pseudo_labels(texts, scores, least=options.least)
    rows = [*labelled * options.copies, *made]
    options.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(labelled)} labelled rows {options.copies} times, {len(made)} of {len(texts)} other texts, written to {options.out}")


if __name__ == "__main__":
    main()
