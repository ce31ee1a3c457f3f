"""Adapters made on the spot for the serving benchmark: random ones, or a given one with noise."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.core.layout import ADAPTER_CONFIG, ADAPTER_METADATA, ADAPTER_WEIGHTS
from edgetune.runtime.bundle.manifest import Manifest


def make_adapters(
    out: Path,
    manifest: Manifest,
    count: int,
    *,
    source: Path | None = None,
    rank: int = 8,
    strength: float = 0.05,
) -> list[str]:
    """Write `count` PEFT folders (`a0`, `a1`, …) that differ, as edgetune writes them, hashes
    included; their names.

    With `source` they are that adapter with noise of a tenth of each tensor's spread; else they are
    random on every linear layer, and `strength` is the spread of B (0.05 changes the answers of
    SmolLM2 beyond recognition).
    """
    from safetensors.numpy import load_file, save_file

    given = {} if source is None else load_file(source / ADAPTER_WEIGHTS)
    names = [f"a{k}" for k in range(count)]
    for seed, name in enumerate(names):
        random_numbers = np.random.default_rng(seed)
        tensors = {key: _noisy(random_numbers, array) for key, array in given.items()}
        for part, width in (
            []
            if given
            else [(part, site.in_features) for site in manifest.sites for part in site.parts]
        ):
            key = f"base_model.model.{part.module}"
            tensors[f"{key}.lora_A.weight"] = (
                random_numbers.standard_normal((rank, width)) * width**-0.5
            ).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = (
                random_numbers.standard_normal((part.stop - part.start, rank)) * strength
            ).astype(np.float32)
        folder = out / name
        folder.mkdir(parents=True)
        save_file(tensors, folder / ADAPTER_WEIGHTS)
        modules = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in tensors})
        plain = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": modules,
            "task_type": "CAUSAL_LM",
        }
        config = plain if source is None else json.loads((source / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
        (folder / ADAPTER_METADATA).write_text(json.dumps(_metadata(folder, manifest)))
    return names


def _noisy(random_numbers: np.random.Generator, array: Any) -> Any:
    return (array + 0.1 * array.std() * random_numbers.standard_normal(array.shape)).astype(
        array.dtype
    )


def _metadata(folder: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "schema": 1,
        "base": {"name": manifest.base.name, "digest": manifest.base.digest},
        "task": "text-generation",
        "labels": None,
        "pooling": None,
        "prompt_format": None,
        "generation": None,
        "max_length": 256,
        "files": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
        },
        "metrics": {},
        "edgetune_version": "0.1.0",
    }


def linked(out: Path, made: Path, names: Sequence[str], count: int) -> list[str]:
    """`count` adapter folders (`n0`, …) whose files are hard links to those of a few: hundreds
    without the disk.
    """
    for k in range(count):
        (out / f"n{k}").mkdir(parents=True)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, ADAPTER_METADATA):
            os.link(made / names[k % len(names)] / name, out / f"n{k}" / name)
    return [f"n{k}" for k in range(count)]
