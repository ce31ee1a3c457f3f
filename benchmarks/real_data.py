"""A finished run, measured on held-out rows in torch and from bundles of several precisions; a
table, then one JSON line.

    python benchmarks/real_data.py RUN DATA [--precision int8 int4] [--mode separate] [--no-torch]
    [--probe TRAIN]

`--probe TRAIN` adds the row every classifier must beat: the frozen encoder with logistic regression
on its pooled, normalised features, trained on TRAIN. Bundles are written to a temporary folder,
proof included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from edgetune.evaluation.evaluate import evaluate


def frozen_probe(train: Path, test: Path) -> dict[str, Any]:
    """Accuracy of logistic regression (C = 10) on frozen MiniLM's normalised mean-pooled
    features.
    """
    import numpy as np
    import torch
    from sklearn.linear_model import LogisticRegression

    from edgetune.data.rows import read_rows
    from edgetune.models.heads import pool
    from edgetune.models.load import load_body, load_tokenizer
    from edgetune.models.resolve import resolve_base

    base = resolve_base("builtin:minilm-l6")
    body, tokenizer = load_body(base), load_tokenizer(base)

    def features(texts: list[str]) -> Any:
        parts = []
        with torch.no_grad():
            for at in range(0, len(texts), 64):
                batch = tokenizer(
                    texts[at : at + 64],
                    padding=True,
                    truncation=True,
                    max_length=128,
                    return_tensors="pt",
                )
                hidden = body(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).last_hidden_state
                parts.append(
                    torch.nn.functional.normalize(
                        pool(hidden, batch["attention_mask"], "mean")
                    ).numpy()
                )
        return np.concatenate(parts)

    started = time.perf_counter()
    rows, held_out = (
        ([row.values["text"] for row in data.rows], [row.values["label"] for row in data.rows])
        for data in (read_rows(train), read_rows(test))
    )
    probe = LogisticRegression(C=10, max_iter=1000).fit(features(rows[0]), rows[1])
    return {
        "accuracy": float(probe.score(features(held_out[0]), held_out[1])),
        "seconds": time.perf_counter() - started,
    }


def bundle_row(run: Path, data: Path, precision: str, mode: str) -> dict[str, Any]:
    """Export with proof, then the metrics from the bundle through the runtime."""
    from edgetune.export.bundle import export_bundle
    from edgetune.quantisation.precision import Precision

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        started = time.perf_counter()
        manifest = export_bundle([("task", run)], out, mode=mode, precision=Precision(precision))
        exported = time.perf_counter() - started
        result = evaluate(out, data, adapter="task")
        proof = manifest.proof["adapters"]["task"]
        size = sum(info.bytes for info in manifest.files.values()) / 1e6
        return {
            **result.metrics,
            "seconds": result.seconds,
            "export_s": exported,
            "bundle_mb": size,
            "kl": proof["mean_kl"],
            "top1": proof["top1"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--precision", nargs="*", default=["int8", "int4"])
    parser.add_argument("--mode", default="separate")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--probe", type=Path)
    options = parser.parse_args()
    summary = json.loads((options.run / "summary.json").read_text())
    rows: dict[str, dict[str, Any]] = {}
    if options.probe:
        rows["frozen + logistic regression"] = frozen_probe(options.probe, options.data)
    if not options.no_torch:
        result = evaluate(options.run, options.data)
        rows["torch fp32"] = {**result.metrics, "seconds": result.seconds}
    for precision in options.precision:
        rows[f"bundle {precision}"] = bundle_row(options.run, options.data, precision, options.mode)
        print(f"bundle {precision}: {rows[f'bundle {precision}']}", flush=True)
    training = {
        key: summary[key]
        for key in ("training_seconds", "tokens_per_second", "peak_rss_mb", "trainable_parameters")
    }
    for name, row in rows.items():
        print(f"{name:<30}" + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    print(
        json.dumps(
            {
                "benchmark": "real_data",
                "run": options.run.name,
                "training": training,
                "results": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
