"""Labels for texts that have none, from adapters trained on the few that do: self-training for
classifiers.

    python examples/pseudo_labels.py BUNDLE unlabelled.jsonl.gz labelled.jsonl.gz out.jsonl [--share
    0.85] [--copies 3]

Two voices, whose geometric mean counts: the adapters of the bundle (several seeds of one recipe,
their probabilities' mean), and labels that spread from the labelled texts along their neighbours in
the frozen base's embedding (Zhou et al. 2003, "Learning with local and global consistency"). The
surest `--share` of the texts join, each with its likeliest label; the labelled rows come first,
`--copies` times. Of the unlabelled file only the column `text` is read. Memory and time grow with
the square of the texts: 10,000 take 1 GB. Rows: {"text", "label"}.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edgetune.runtime import Runtime

Row = dict[str, Any]
Floats = npt.NDArray[np.float32]

NEIGHBOURS, TEMPERATURE = 10, 0.1  # of a text, and of the similarities between them
STAY = 0.05  # of a text's labels that stay with it in a step of spreading
STEPS = 30
ADAPTERS_WEIGHT = 0.3  # in the geometric mean


def spread(
    known: Floats, classes: npt.NDArray[np.int64], unknown: Floats, *, labels: int
) -> Floats:
    """Probabilities (unknown, labels) of texts by their unit-length embeddings and those of the
    labelled ones.
    """
    points = np.concatenate([known, unknown])
    similar = points @ points.T
    np.fill_diagonal(similar, -1.0)
    count = min(NEIGHBOURS, len(points) - 1)
    nearest = np.argpartition(-similar, count - 1, axis=1)[:, :count]
    edges = np.zeros_like(similar)
    np.put_along_axis(
        edges,
        nearest,
        np.exp((np.take_along_axis(similar, nearest, axis=1) - 1.0) / TEMPERATURE),
        axis=1,
    )
    edges = np.maximum(edges, edges.T)
    scale = 1.0 / np.sqrt(edges.sum(axis=1))
    edges *= scale[:, None]
    edges *= scale
    start = np.zeros((len(points), labels), np.float32)
    start[np.arange(len(known)), classes] = 1.0
    flow = start
    for _ in range(STEPS):
        flow = (1.0 - STAY) * (edges @ flow) + STAY * start
    found: Floats = flow[len(known) :]
    return found / (found.sum(axis=1, keepdims=True) + 1e-9)


def together(adapters: Floats, neighbours: Floats) -> Floats:
    """The weighted geometric mean of two tables of probabilities (texts, labels)."""
    product = np.exp(
        ADAPTERS_WEIGHT * np.log(adapters + 1e-6)
        + (1.0 - ADAPTERS_WEIGHT) * np.log(neighbours + 1e-6)
    )
    normed: Floats = product / product.sum(axis=1, keepdims=True)
    return normed


def surest(
    texts: Sequence[str], names: Sequence[str], probabilities: Floats, *, share: float
) -> list[Row]:
    """Rows of the surest share of the texts with their likeliest label, in the order of the
    texts.
    """
    kept = np.sort(
        np.argsort(-probabilities.max(axis=1), kind="stable")[: round(share * len(texts))]
    )
    return [{"text": texts[at], "label": names[int(probabilities[at].argmax())]} for at in kept]


def probabilities_of(
    runtime: Runtime, texts: Sequence[str], labelled: Sequence[Row]
) -> tuple[list[str], Floats]:
    """The labels, and both voices' probabilities (texts, labels)."""
    voices = [
        [found.scores for found in runtime.classify(texts, name, truncate=True)]
        for name in runtime.adapters
    ]
    names = sorted(voices[0][0])
    adapters = np.mean(
        [[[scores[name] for name in names] for scores in voice] for voice in voices],
        axis=0,
        dtype=np.float32,
    )
    readable = [
        {"text": name.replace("_", " "), "label": name} for name in names
    ]  # a label's name is a labelled text, too
    shown = [*labelled, *readable]
    known, unknown = (
        runtime.embed([row["text"] for row in shown], truncate=True),
        runtime.embed(texts, truncate=True),
    )
    classes = np.array([names.index(row["label"]) for row in shown])
    return names, together(adapters, spread(known, classes, unknown, labels=len(names)))


def new_texts(texts: Sequence[str], known: Sequence[str]) -> list[str]:
    """The texts that are none of the known ones, whatever their case and spaces."""
    seen = {_plain(text) for text in known}
    return [text for text in texts if _plain(text) not in seen]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def read(path: Path) -> list[Row]:
    """The rows of a .jsonl or .jsonl.gz file."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main() -> None:
    """Command line."""
    from edgetune.runtime import Runtime

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("bundle", "unlabelled", "labelled", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument(
        "--share", type=float, default=0.85, help="of the texts that join, the surest first"
    )
    parser.add_argument(
        "--copies", type=int, default=3, help="times that the labelled rows are written"
    )
    options = parser.parse_args()
    labelled = [{"text": row["text"], "label": row["label"]} for row in read(options.labelled)]
    texts = new_texts(
        [row["text"] for row in read(options.unlabelled)], [row["text"] for row in labelled]
    )
    with Runtime.open(options.bundle) as runtime:
        names, probabilities = probabilities_of(runtime, texts, labelled)
    made = surest(texts, names, probabilities, share=options.share)
    rows = [*labelled * options.copies, *made]
    options.out.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    print(
        f"{len(labelled)} labelled rows {options.copies} times, {len(made)} of {len(texts)} other"
        f" texts, written to {options.out}"
    )


if __name__ == "__main__":
    main()
