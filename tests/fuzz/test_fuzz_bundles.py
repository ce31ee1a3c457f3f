"""Mutated bundles, drawn by a seed: each is refused by an error of ours, or answers as before.

`EDGETUNE_FUZZ` bundles (default 60), from `EDGETUNE_FUZZ_SEED` (default 0) on.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fuzz.test_fuzz_adapters import FILES, ROUNDS, SEED, VALUES, not_frozen
from runtime_helpers import encoder_bundle

from edgetune.core.errors import EdgetuneError
from edgetune.runtime import Runtime

MANIFEST = "edgetune.json"
READ = (
    MANIFEST,
    "engine.onnx",
    "model.onnx.data",
    "tokenizer.json",
    "adapters/intent/adapter_config.json",
)


def change_manifest(folder: Path, rng: random.Random) -> None:
    """Another value, or none, somewhere in the manifest."""
    document = json.loads((folder / MANIFEST).read_text())
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
            break
        place = inner
    if rng.random() < 0.3:
        del place[key]
    else:
        place[key] = rng.choice(VALUES)
    (folder / MANIFEST).write_text(json.dumps(document))


def change_file(folder: Path, rng: random.Random) -> None:
    """Other bytes, another end, or another kind of file."""
    path = folder / rng.choice(READ)
    data = bytearray(path.read_bytes())
    path.unlink()
    way = rng.randrange(5)
    if way == 0:
        path.write_bytes(rng.choice(FILES))
    elif way == 1:
        path.mkdir()
    elif way == 2:
        os.mkfifo(path)
    elif way == 3:
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


@pytest.mark.slow
def test_a_mutated_bundle_is_refused_or_answers_as_before(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    bundle, figures = encoder_bundle(tiny_encoder), Counter[str]()
    with Runtime.open(bundle, threads=1) as runtime:
        wanted = runtime.classify(["lights on", "hello"], "intent")
    for seed in range(SEED, SEED + ROUNDS):
        rng, folder = random.Random(seed), tmp_path / str(seed)
        shutil.copytree(bundle, folder)
        (change_manifest if rng.random() < 0.6 else change_file)(folder, rng)
        try:
            with not_frozen(), Runtime.open(folder, threads=1) as runtime:
                found = runtime.classify(["lights on", "hello"], "intent")
        except EdgetuneError as error:
            assert len(str(error)) < 40_000, f"seed {seed}"
            figures["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        else:
            assert all(math.isfinite(v) for one in found for v in one.scores.values())
            figures["as before" if found == wanted else "another answer"] += 1
        shutil.rmtree(folder)
    print(f"bundles {ROUNDS} from seed {SEED}: {dict(figures)}")
