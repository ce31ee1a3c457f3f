"""A DeBERTa's graphs beside torch, at several lengths: a table, then one JSON line.

    python benchmarks/disentangled.py [--threads 1] [--rounds 20]

The model is as large as DeBERTa-v3-xsmall without its embedding (12 layers, hidden 384), its
weights random, its tokenizer the built-in MiniLM's; the adapter has r = 8 on all linear layers.
Milliseconds of one text of random tokens, the least of `--rounds` (a fifth of them from 200 tokens
on), the variants in turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, DebertaV2Config

from edgetune.adapters.folder import AdapterMetadata, load_adapter, save_adapter
from edgetune.adapters.lora import adapt
from edgetune.models.heads import SequenceClassifier
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.recipe.schema import Parameters
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.runtime.engine.encoder import EncoderEngine

LENGTHS, LABELS = (16, 64, 256), ("a", "b", "c")
VARIANTS = {
    "separate": ("--mode", "separate", "--precision", "fp32"),
    "merged": ("--mode", "merged", "--precision", "fp32"),
    "int8": ("--precision", "int8"),
}


def make_base(folder: Path) -> Path:
    """The random model with MiniLM's tokenizer."""
    tokenizer = resolve_base("builtin:minilm-l6").folder
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tokenizer / name, folder / name)
    config = DebertaV2Config(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
        pad_token_id=0,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path) -> Path:
    """An adapter that was not trained, with an effect."""
    found = resolve_base(str(base))
    model = adapt(
        SequenceClassifier(load_body(found), labels=len(LABELS), pooling=found.pooling or "mean"),
        Parameters(),
        task="sequence-classification",
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    save_adapter(
        model,
        folder,
        AdapterMetadata(
            base={"name": found.name, "digest": found.digest},
            task="sequence-classification",
            labels=LABELS,
            pooling=found.pooling,
        ),
    )
    return folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as root:
        base = make_base(Path(root, "base"))
        adapter = make_adapter(base, Path(root, "adapter"))
        runs: dict[str, Callable[[list[int]], object]] = {}
        for name, how in VARIANTS.items():
            bundle = Path(root, name)
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "edgetune",
                    "export",
                    "--adapter",
                    f"a={adapter}",
                    "--out",
                    str(bundle),
                    *how,
                ],
                check=True,
                stdout=sys.stderr,
            )
            manifest = read_manifest(bundle)
            engine = EncoderEngine(bundle, manifest, threads=options.threads)
            bound = None if name == "merged" else pack_adapter(adapter, manifest).tensors
            runs[name] = lambda ids, engine=engine, bound=bound: engine.run([ids], [bound])
        found = resolve_base(str(base))
        model = load_adapter(
            SequenceClassifier(
                load_body(found), labels=len(LABELS), pooling=found.pooling or "mean"
            ),
            adapter,
        ).eval()
        runs["torch"] = lambda ids: model(
            torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)
        )
        best = measure(runs, options.rounds)
    print(
        "| tokens | "
        + " | ".join(f"{name}, ms" for name in runs)
        + " |\n|"
        + "---|" * (len(runs) + 1)
    )
    for length, times in best.items():
        print(f"| {length} | " + " | ".join(f"{times[name]:.1f}" for name in runs) + " |")
    print(json.dumps({"threads": options.threads, "ms": best}))


@torch.no_grad()
def measure(
    runs: dict[str, Callable[[list[int]], object]], rounds: int
) -> dict[int, dict[str, float]]:
    """The least milliseconds of each variant, by length."""
    best: dict[int, dict[str, float]] = {}
    for length in LENGTHS:
        ids = np.random.default_rng(0).integers(1000, 30000, length).tolist()
        best[length] = dict.fromkeys(runs, float("inf"))
        for _ in range(rounds if length < 200 else max(1, rounds // 5)):
            for name, run in runs.items():
                started = time.perf_counter()
                run(ids)
                best[length][name] = min(best[length][name], 1e3 * (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
