"""Adapters that come from anywhere: each is refused in one line, whatever it holds, and none makes
an answer that is not finite.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_helpers import decoder_manifest, peft_adapter
from safetensors.numpy import load_file, save_file

from edgetune.core.errors import AdapterError
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.adapters.patterns import fullmatch, is_safe, matches_end

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def configured(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return change


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def another_kind(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return save


def scaled(factor: float) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda found: found.update(
        {k: v * np.float32(factor) for k, v in found.items() if "lora_B" in k}
    )


HOSTILE = {
    "lookaround": configured(target_modules="(?=a)b"),
    "thousands of patterns": configured(alpha_pattern={f"a{i}": 8 for i in range(5000)}),
    "no rank": configured(r=None),
    "no alpha": configured(lora_alpha=None),
    "deep JSON": written(CONFIG, "[" * 100_000),
    "a huge number": written(CONFIG, '{"r": ' + "1" * 5000 + "}"),
    "half a surrogate pair": written(CONFIG, '{"peft_type": "\\ud800"}'),
    "a large configuration": written(CONFIG, b" " * (5 << 20) + b"{}"),
    "weights that are a folder": another_kind(WEIGHTS, Path.mkdir),
    "weights that are a pipe": another_kind(WEIGHTS, os.mkfifo),
    "a configuration that is a pipe": another_kind(CONFIG, os.mkfifo),
    "metadata that is a folder": another_kind("edgetune_adapter.json", Path.mkdir),
    "a long name": written("edgetune_adapter.json", '{"files": {"%s": "x"}}' % ("x" * 5000)),
    "a header of no length": written(WEIGHTS, bytes(4096)),
    "a header beyond the file": written(WEIGHTS, struct.pack("<Q", 1 << 40) + b"{}"),
    "a header that is a list": written(WEIGHTS, struct.pack("<Q", 2) + b"[]"),
    "offsets that are texts": written(
        WEIGHTS,
        struct.pack("<Q", 56) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":["0",4]}}',
    ),
    "a hundred thousand tensors": tensors(
        lambda found: found.update({f"t{i}": np.zeros(0, np.float32) for i in range(15_000)})
    ),
    "products beyond float32": tensors(
        lambda found: found.update({k: np.full_like(v, 3e38) for k, v in found.items()})
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    peft_adapter(tiny_decoder, folder)
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_adapter_is_refused_in_a_short_message(
    name: str, good: Path, tmp_path: Path
) -> None:
    for file in (CONFIG, WEIGHTS):
        (tmp_path / file).write_bytes((good / file).read_bytes())
    HOSTILE[name](tmp_path)
    with pytest.raises(AdapterError) as refused:
        pack_adapter(tmp_path, decoder_manifest())
    assert len(str(refused.value)) < 30_000


@pytest.mark.parametrize("name", ["t", "base_model.model.lm_head.lora_A.weight"])
def test_a_sparse_file_is_refused_by_its_header(name: str, good: Path, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes((good / CONFIG).read_bytes())
    with (tmp_path / WEIGHTS).open("wb") as file:
        header = json.dumps(
            {"t": {"dtype": "U8", "shape": [1 << 34], "data_offsets": [0, 1 << 34]}}
        )
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + (1 << 34))
    with pytest.raises(AdapterError, match="expected at most"):
        pack_adapter(tmp_path, decoder_manifest())


def test_a_name_that_no_folder_can_have_is_no_folder() -> None:
    for name in ("a" * 5000, "a\0b"):
        with pytest.raises(AdapterError, match="no such folder"):
            pack_adapter(name, decoder_manifest())


def test_an_adapter_without_effect_is_doubted(good: Path, tmp_path: Path) -> None:
    for file in (CONFIG, WEIGHTS):
        (tmp_path / file).write_bytes((good / file).read_bytes())
    assert not any("no effect" in line for line in pack_adapter(good, decoder_manifest()).doubts)
    tensors(scaled(0))(tmp_path)
    doubts = pack_adapter(tmp_path, decoder_manifest()).doubts
    assert "could not be checked" in doubts[0] and "no effect" in doubts[1]


PATTERNS = (
    r"q_proj", r"self_attn.q_proj", r".*\.q_proj", r"^model\.layers\.\d+\..*", r"(q|v)_proj",
    r"layers\.[0-9]+\.(self_attn|mlp)\.(q|up)(_proj)?", r".*\.(1|12)\.self_attn\.[qv]_proj",
    r"(a|b)*", r"(?:a|b)+?", r"[^q]*", r"a{1,2}", r"^$", r"(^a|b$)", r"\S+", r"a*b?", "", "|a",
)  # fmt: skip
NAMES = (
    "model.layers.0.self_attn.q_proj", "model.layers.12.self_attn.v_proj", "model.layers.1.mlp.up",
    "layers", "a", "aa", "ab", "a.b", "", "b.a.a",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_pythons_own_engine(pattern: str) -> None:
    for name in NAMES:
        assert fullmatch(pattern, name) is (re.fullmatch(pattern, name) is not None)
        as_peft = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert matches_end(pattern, name) is as_peft


def test_a_backtracking_pattern_takes_steps_by_the_names_length() -> None:
    assert not fullmatch(r"(\w+\.?)*!", "x" * 5000)


@pytest.mark.parametrize(
    "pattern",
    [
        "(?=a)b",
        r"(a)\1",
        "(?i)a",
        "(?i:a)",
        "(" * 900,
        "a{10000}",
        "(a{100}){100}",
        "[",
        "a" * 2000,
    ],
)
def test_what_has_no_small_automaton_is_refused(pattern: str) -> None:
    assert not is_safe(pattern)
