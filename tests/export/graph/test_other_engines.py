"""Others can open it: the same bundle, unchanged, in onnxruntime-genai and in plain ONNX
Runtime.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from export_helpers import export, make_adapter
from family_helpers import make_family

from edgetune.runtime import Runtime

ROOT = Path(__file__).parents[3]
CLIENT = ROOT / "examples" / "clients" / "genai.py"
PROMPT = "Turn on the lights in the hall, please!"


@pytest.fixture(scope="module", params=["fp32", "int4"])
def bundle(
    request: pytest.FixtureRequest, tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle with two adapters, one of them with other ranks and targets than the other."""
    folder = tmp_path_factory.mktemp(request.param)
    home = make_adapter(tiny_decoder, folder / "home", strength=0.5)
    terse = make_adapter(
        tiny_decoder,
        folder / "terse",
        seed=1,
        rank=2,
        rank_pattern={"v_proj": 5},
        target_modules=("q_proj", "v_proj"),
        strength=1.0,
    )
    export(folder / "bundle", home, terse, precision=request.param)
    return folder / "bundle"


@pytest.fixture(scope="module")
def genai() -> str:
    """A Python with onnxruntime-genai, which wants an environment of its own; else a skip that says
    so.
    """
    python = os.environ.get("EDGETUNE_GENAI_PYTHON", sys.executable)
    if subprocess.run(
        [python, "-c", "import onnxruntime_genai"], capture_output=True, check=False
    ).returncode:
        pytest.skip(
            "onnxruntime-genai is not installed: EDGETUNE_GENAI_PYTHON names a Python that has it"
        )
    return python


def assert_same_tokens(genai: str, bundle: Path, adapter: str | None) -> None:
    """The greedy answer of the runtime, and that of onnxruntime-genai; another one than with or
    without another adapter.
    """
    with Runtime.open(bundle, threads=1) as runtime:
        ids = runtime.prompt_ids(PROMPT, adapter)
        (expected,) = runtime.generate([PROMPT], adapter, max_new_tokens=16)
        (other,) = runtime.generate([PROMPT], None if adapter else "home", max_new_tokens=16)
    command = [genai, str(CLIENT), str(bundle), adapter or "-", *map(str, ids)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = [
        token
        for token in expected.token_ids
        if token not in runtime.manifest.tokenizer.eos_token_ids
    ]  # genai leaves the end out
    assert [int(token) for token in done.stdout.split()] == answer != list(other.token_ids)


@pytest.mark.parametrize("adapter", ["home", "terse", None])
def test_onnxruntime_genai_answers_with_the_same_tokens(
    adapter: str | None, genai: str, bundle: Path
) -> None:
    assert_same_tokens(genai, bundle, adapter)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "phi3", "qwen3"])
def test_so_it_does_for_other_families(
    family: str, genai: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    # Gemma 3 norms what each layer adds and multiplies embeddings by √hidden: larger ones would
    # only ever repeat the last token.
    smaller = {"initializer_range": 0.05} if family == "gemma3_text" else {}
    base = make_family(family, tiny_decoder, tmp_path / "base", **smaller)
    export(tmp_path / "bundle", make_adapter(base, tmp_path / "home", strength=0.5))
    for adapter in ("home", None):
        assert_same_tokens(genai, tmp_path / "bundle", adapter)


def snippet(document: Path, word: str) -> str:
    """The Python block of a document that holds this word."""
    (found,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
        if word in block
    ]
    return str(found)


def test_the_docs_run_an_adapter_in_a_dozen_lines_of_plain_onnx_runtime(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = snippet(ROOT / "docs" / "how-to" / "other-engines.md", "ort.LoraAdapter()")
    assert len(code.strip().splitlines()) <= 12 and "edgetune" not in code
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "home").symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    adapted, base = run(code), run(code.replace("inputs, options", "inputs"))
    with Runtime.open(bundle, threads=1, engine="onnxruntime") as runtime:
        ids = runtime.tokenizer.encode("dim the lights in the hall")
        for logits, adapter in ((adapted, runtime.bound("home")), (base, None)):
            (expected,) = runtime.decoder.logits([ids], [adapter])
            assert np.abs(logits - expected[-1]).max() < 1e-4
    assert np.abs(adapted - base).max() > 0.1


def run(code: str) -> np.ndarray:
    """The `logits` that a piece of the document computes."""
    names: dict[str, np.ndarray] = {}
    exec(code, names)
    return names["logits"]
