"""What a bundle's embedding is worth to a classifier, before and after contrastive training; a
table, then one JSON line.

    python benchmarks/embeddings.py BUNDLE --adapter NAME --train FEW --test TEST

Every text is embedded by the base and by the adapter of the same bundle. A test row gets the label
of its nearest training row, or what logistic regression (C = 10) learned on the training rows says.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from edgetune.data.rows import read_rows
from edgetune.runtime import Runtime

ROWS_AT_ONCE = 32


def embedded(runtime: Runtime, texts: list[str], adapter: str | None) -> NDArray[np.float32]:
    """Unit-length embeddings (texts, hidden), texts of like length at once."""
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    parts = [
        runtime.embed(
            [texts[at] for at in order[start : start + ROWS_AT_ONCE]],
            adapters=None,
            adapter=adapter,
            truncate=True,
        )
        for start in range(0, len(order), ROWS_AT_ONCE)
    ]
    found = np.concatenate(parts)
    found[order] = found.copy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--test", required=True, type=Path)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    files = [read_rows(path).rows for path in (options.train, options.test)]
    texts = [[row.values["text"] for row in rows] for rows in files]
    labels, right = (np.array([row.values["label"] for row in rows]) for rows in files)
    results: dict[str, dict[str, float]] = {}
    with Runtime.open(options.bundle, threads=options.threads) as runtime:
        for name, adapter in (("base", None), (options.adapter, options.adapter)):
            train, test = (embedded(runtime, one, adapter) for one in texts)
            nearest = labels[(test @ train.T).argmax(1)]
            probe = LogisticRegression(C=10, max_iter=1000).fit(train, labels)
            results[name] = {
                "nearest": float((nearest == right).mean()),
                "logistic_regression": float(probe.score(test, right)),
            }
            print(name, "  ".join(f"{k} {v:.4f}" for k, v in results[name].items()), flush=True)
    print(json.dumps({"benchmark": "embeddings", "bundle": str(options.bundle), **results}))


if __name__ == "__main__":
    main()
