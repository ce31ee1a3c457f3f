"""Hostile adapters, drawn by a seed: each loads or is refused by an error of ours, in bounded time,
and what it answers is finite.

`EDGETUNE_FUZZ` adapters (default 60), from `EDGETUNE_FUZZ_SEED` (default 0) on.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_helpers import encoder_bundle
from safetensors.numpy import load_file, save_file

from edgetune.core.errors import EdgetuneError
from edgetune.runtime import Runtime

ROUNDS, SEED = (
    int(os.environ.get(f"EDGETUNE_FUZZ{part}", n)) for part, n in (("", 60), ("_SEED", 0))
)
CONFIG, METADATA = "adapter_config.json", "edgetune_adapter.json"
WEIGHTS = "adapter_model.safetensors"
FROZEN_S = 60
"""An adapter that takes longer has frozen the process."""
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


@contextmanager
def not_frozen() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError("frozen")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(FROZEN_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


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
        data[rng.randrange(len(data))] = rng.randrange(256)
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


CHANGES: tuple[Callable[[Path, random.Random], None], ...] = (
    change_key, change_key, change_key, replace_file, damage_bytes, change_tensor, change_tensor,
)  # fmt: skip


def hostile(good: Path, folder: Path, rng: random.Random) -> Path:
    shutil.copytree(good, folder)
    if rng.random() < 0.8:  # else the digests in it catch most
        (folder / METADATA).unlink()
    for _ in range(rng.randint(1, 3)):
        try:
            rng.choice(CHANGES)(folder, rng)
        except (
            OSError,
            ValueError,
            TypeError,
            RecursionError,
        ):  # on another change
            continue
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
    return folder


def finite(runtime: Runtime, name: str) -> str:
    """What an adapter that loaded answers: finite, or refused."""
    labels = runtime.labels(name) is not None and runtime.task(name) == "sequence-classification"
    if labels:
        scores = runtime.classify(["lights on", "hello"], name)
        assert all(math.isfinite(value) for one in scores for value in one.scores.values())
    assert np.isfinite(runtime.embed(["hello"], name)).all()
    return "answered"


@pytest.mark.slow
def test_a_hostile_adapter_loads_or_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    bundle, figures = encoder_bundle(tiny_encoder), Counter[str]()
    good = bundle / "adapters" / "intent"
    with Runtime.open(bundle, threads=1) as runtime:
        before = runtime.classify(["lights on"], "intent")
        for seed in range(SEED, SEED + ROUNDS):
            folder = hostile(good, tmp_path / str(seed), random.Random(seed))
            try:
                with not_frozen():
                    runtime.load_adapter("x", folder)
                    figures[finite(runtime, "x")] += 1
            except EdgetuneError as error:
                assert len(str(error)) < 40_000, f"seed {seed}"
                figures["refused"] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
            if "x" in runtime.adapters:
                runtime.unload_adapter("x")
            shutil.rmtree(folder)
        assert runtime.classify(["lights on"], "intent") == before
    print(f"adapters {ROUNDS} from seed {SEED}: {dict(figures)}")
