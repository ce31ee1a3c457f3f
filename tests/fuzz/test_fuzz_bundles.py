"""Mutated bundles, drawn by a seed: each is refused by an error of ours, or answers as before."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from fuzz.figures import ROUNDS, SEED, Figures
from fuzz.test_fuzz_adapters import FILES, VALUES
from runtime_helpers import decoder_bundle, encoder_bundle

from edgetune.core.layout import ADAPTER_CONFIG
from edgetune.runtime import Runtime

MANIFEST, TEXTS = "edgetune.json", ["lights on", "hello"]
DATA = ("engine.onnx", "model.onnx.data", "tokenizer.json")


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
    adapter = rng.choice(sorted((folder / "adapters").iterdir()))
    path = rng.choice([folder / MANIFEST, *(folder / n for n in DATA), adapter / ADAPTER_CONFIG])
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


def encoder_answers(runtime: Runtime) -> list[Any]:
    return [tuple(one.scores.items()) for one in runtime.classify(TEXTS, "intent")]


def decoder_answers(runtime: Runtime) -> list[Any]:
    return [
        answer.text
        for adapter in ("a", "b", None)
        for answer in runtime.generate(TEXTS, adapter, max_new_tokens=4, temperature=0)
    ]


def finite(answers: list[Any]) -> bool:
    return all(math.isfinite(v) for one in answers if isinstance(one, tuple) for _, v in one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_mutated_bundle_is_refused_or_answers_as_before(
    tiny_encoder: Path, tiny_decoder: Path, tmp_path: Path, kind: str
) -> None:
    encoder = kind == "encoder"
    bundle = encoder_bundle(tiny_encoder) if encoder else decoder_bundle(tiny_decoder)
    answers, figures = encoder_answers if encoder else decoder_answers, Figures(f"{kind} bundles")
    with Runtime.open(bundle, threads=1) as runtime:
        wanted = answers(runtime)
    for seed in range(SEED, SEED + ROUNDS):
        rng, folder = random.Random(seed), tmp_path / str(seed)
        shutil.copytree(bundle, folder)
        (change_manifest if rng.random() < 0.6 else change_file)(folder, rng)
        with figures.case(seed), Runtime.open(folder, threads=1) as runtime:
            found = answers(runtime)
            if not finite(found):
                figures.fault("not finite", f"seed {seed}")
            figures.count("as before" if found == wanted else "another answer")
        shutil.rmtree(folder)
    figures.check()
