"""Hostile adapters, drawn by a seed: each loads or is refused by an error of ours, in bounded time,
and what it answers is finite.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.figures import ROUNDS, SEED, Figures
from runtime_helpers import encoder_bundle
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edgetune.core.adapter_codes import Coded
from edgetune.core.files import sha256_file
from edgetune.runtime import Runtime

CONFIG, METADATA = "adapter_config.json", "edgetune_adapter.json"
WEIGHTS = "adapter_model.safetensors"
KEYS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "exclude_modules", "bias", "use_rslora", "peft_type",
    "base_model_name_or_path", "init_lora_weights", "task_type", "labels", "files", "base", "task",
    "pooling", "max_length", "prompt_format", "schema", "problem", "base_precision", "generation",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, 0, -1, 1, 3, 10**18, 1e30, -0.5, True, "", "x" * 3000, "\ud800", "..", "(a*)*b", "[", [],
    [None], ["query"], [[1]], {}, {"a": 1}, {r"(\w+\.?)*!": 8}, {"query": 2}, {"": None},
    {f"a{i}": 1 for i in range(3000)}, "(?=a)", "query|value", ["classifier"], math.nan, math.inf,
)  # fmt: skip
FILES = (
    b"", b"{}", b"[]", b"null", b"[" * 50_000, b'{"a":' * 50_000, b'{"r": ' + b"1" * 5000 + b"}",
    b"\xff\xfe", b" " * (5 << 20), bytes(64), struct.pack("<Q", 1 << 62),
)  # fmt: skip


def change_key(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice([CONFIG, METADATA])
    if path.exists() and not path.is_file():  # a pipe, put there before
        return
    document = json.loads(path.read_text()) if path.is_file() else {}
    document[rng.choice(KEYS)] = rng.choice(VALUES)
    path.write_text(json.dumps(document))


def replace_file(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice([CONFIG, METADATA, WEIGHTS])
    path.unlink(missing_ok=True)
    rng.choice([
        lambda: path.write_bytes(rng.choice(FILES)), lambda: None, path.mkdir,
        lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"),
    ])()  # fmt: skip


def damage_bytes(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice([CONFIG, METADATA, WEIGHTS])
    data = bytearray(path.read_bytes() if path.is_file() else b"")
    if not data:
        return
    for _ in range(rng.randint(1, 20)):
        data[rng.randrange(len(data))] = rng.randrange(256 if path.name == WEIGHTS else 127)
    path.write_bytes(data[: rng.randint(0, len(data))] if rng.random() < 0.3 else data)


def change_tensor(folder: Path, rng: random.Random) -> None:
    if not (folder / WEIGHTS).is_file():
        return
    tensors = load_file(folder / WEIGHTS)
    name = rng.choice(sorted(tensors))
    old = tensors.pop(name)
    new = rng.choice([
        old * np.float32(rng.choice([0, 1e10, 1e30, 3e38, math.nan])), np.full_like(old, 3e38),
        old[..., :1], old[None], old.astype(np.int32), np.zeros(0, np.float32), old.T.copy(),
    ])  # fmt: skip
    tensors[
        rng.choice([name, name, name, "x", f"{name}.x", "base_model.model.classifier.bias"])
    ] = new
    save_file(
        {key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / WEIGHTS
    )


def change_codes(folder: Path, rng: random.Random) -> None:
    """Put a tensor in codes in a tensor's place, its name or its bytes as they should not be."""
    tensors = load_file(folder / WEIGHTS)
    name = rng.choice([key for key in tensors if "lora_A" in key])
    module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    for side in "AB":
        tensors.pop(f"base_model.model.{module}.lora_{side}.weight", None)
    bits = rng.choice([2, 3, 4, 8])
    one = Coded(module, bits, (rng.choice([64, 128, 1, 9_999_999]), rng.choice([64, 128, 3])))
    width = one.row_bytes if one.row_bytes < 1 << 16 else 100
    rows = np.frombuffer(rng.randbytes(4 * width), np.uint8).reshape(4, width)
    key = rng.choice([one.key, one.key, f"{one.key}x3", one.key.replace("bit", "bits"), module])
    save_file(
        tensors | {key: rows[: rng.choice([0, 1, 4]), : rng.choice([width, 9])]}, folder / WEIGHTS
    )
    path = folder / CONFIG
    document = json.loads(path.read_text())
    version = rng.choice([1, 1, 1, 2, None, True, "1", [], 1.0])
    path.write_text(
        json.dumps(document | {"edgetune_codes": version, "peft_type": rng.choice(["LORA", "x"])})
    )


CHANGES: tuple[Callable[[Path, random.Random], None], ...] = (
    change_key, change_key, change_key, replace_file, damage_bytes, change_tensor, change_tensor,
    change_codes,
)  # fmt: skip


def renew_digests(folder: Path) -> None:
    """Let the metadata have the digests of the changed files, so that these are looked into."""
    path = folder / METADATA
    if not path.is_file() or path.is_symlink():
        return
    document = json.loads(path.read_text())
    document["files"] = {
        name: sha256_file(folder / name)
        for name in (WEIGHTS, CONFIG)
        if (folder / name).is_file() and not (folder / name).is_symlink()
    }
    path.write_text(json.dumps(document))


def hostile(good: Path, folder: Path, rng: random.Random) -> Path:
    shutil.copytree(good, folder)
    if (own := rng.random()) < 0.2:
        (folder / METADATA).unlink()
    for _ in range(rng.randint(1, 3)):
        with suppress(OSError, ValueError, TypeError, RecursionError, SafetensorError):
            rng.choice(CHANGES)(folder, rng)  # one may not apply after another
    if own < 0.9:
        with suppress(ValueError, TypeError, RecursionError):
            renew_digests(folder)
    return folder


def finite(runtime: Runtime, name: str) -> bool:
    """Whether what an adapter that loaded answers is finite."""
    values = list(runtime.embed(["hello"], name)[0])
    if runtime.labels(name) is not None and runtime.task(name) == "sequence-classification":
        scores = runtime.classify(["lights on", "hello"], name)
        values += [value for one in scores for value in one.scores.values()]
    return bool(np.isfinite(values).all())


@pytest.mark.slow
def test_a_hostile_adapter_loads_or_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    bundle, figures = encoder_bundle(tiny_encoder), Figures("adapters")
    good = bundle / "adapters" / "intent"
    with Runtime.open(bundle, threads=1) as runtime:
        before = runtime.classify(["lights on"], "intent")
        for seed in range(SEED, SEED + ROUNDS):
            folder = hostile(good, tmp_path / str(seed), random.Random(seed))
            with figures.case(seed):
                runtime.load_adapter("x", folder)
                if finite(runtime, "x"):
                    figures.count("answered")
                else:
                    figures.fault("not finite", f"seed {seed}")
            if "x" in runtime.adapters:
                runtime.unload_adapter("x")
            shutil.rmtree(folder)
        assert runtime.classify(["lights on"], "intent") == before
    figures.check()
