"""WikiText-2 perplexity of decoder bundles, through the real engine: what each precision costs.

    EDGETUNE_DATASETS=… python benchmarks/perplexity.py BUNDLE [BUNDLE …] [--rows 12] [--torch]
        [--engines native,onnxruntime]

The first rows × 512 tokens of the test text, no overlap, no adapter; `--torch` adds the base in
torch fp32. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

LENGTH = 512
Logits = Callable[[list[int]], npt.NDArray[np.float32]]  # token ids → (len, vocabulary)


def rows_of(tokenizer_file: Path, count: int) -> list[list[int]]:
    """The first `count` rows of 512 tokens of WikiText-2's raw test text."""
    from tokenizers import Tokenizer

    source = Path(os.environ["EDGETUNE_DATASETS"]) / "general_ability" / "wikitext2_raw_test.txt.gz"
    with gzip.open(source, "rt", encoding="utf-8") as file:
        text = file.read(count * LENGTH * 8)
    ids = Tokenizer.from_file(str(tokenizer_file)).encode(text, add_special_tokens=False).ids
    return [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(count)]


def perplexity(logits_of: Logits, rows: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood of every token but each row's first."""
    total = 0.0
    for row in rows:
        logits = logits_of(row)[:-1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        normaliser = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
        total += float((normaliser - logits[np.arange(len(row) - 1), row[1:]]).sum())
    return math.exp(total / (len(rows) * (LENGTH - 1)))


def engine_logits(bundle: Path, name: str) -> Logits:
    """One prefill a row, by the engine of this name."""
    from edgetune.runtime.bundle.manifest import read_manifest
    from edgetune.runtime.tasks.choose_engine import open_decoder

    engine, _ = open_decoder(bundle, read_manifest(bundle), engine=name, threads=2)
    return lambda row: engine.logits([row])[0]


def torch_logits(base_name: str) -> Logits:
    """The base model in torch fp32."""
    import torch

    from edgetune.models.load import load_body
    from edgetune.models.resolve import resolve_base

    model = load_body(resolve_base(base_name))

    def once(row: list[int]) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            return np.asarray(
                model(input_ids=torch.tensor([row]), use_cache=False).logits[0].numpy()
            )

    return once


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--engines", default="native,onnxruntime")
    options = parser.parse_args()
    manifest = json.loads((options.bundles[0] / "edgetune.json").read_text())
    rows = rows_of(options.bundles[0] / "tokenizer.json", options.rows)
    results: dict[str, float] = {}
    if options.torch:
        results["torch fp32"] = perplexity(torch_logits(manifest["base"]["name"]), rows)
        print(f"{'torch fp32':<40}{results['torch fp32']:>10.3f}")
    for bundle in options.bundles:
        for engine in options.engines.split(","):
            value = perplexity(engine_logits(bundle, engine), rows)
            results[f"{bundle.name}, {engine}"] = value
            size = sum(file.stat().st_size for file in bundle.glob("model.onnx*")) / 1e6
            print(f"{bundle.name + ', ' + engine:<40}{value:>10.3f}{size:>9.1f} MB")
    print(
        json.dumps(
            {"benchmark": "perplexity", "rows": options.rows, "length": LENGTH, "results": results}
        )
    )


if __name__ == "__main__":
    main()
