"""The example clients: the same bundle answers from another language as from edgetune's own runtime."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from runtime_helpers import decoder_bundle

from edgetune.runtime import Runtime

CLIENTS = Path(__file__).parent.parent / "examples" / "clients"


@pytest.fixture(scope="module")
def node() -> str:
    """Node with onnxruntime-node in its path, else a skip that says what is missing."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("Node is not installed")
    probe = subprocess.run([found, "-e", "require('onnxruntime-node')"], cwd=CLIENTS, capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("onnxruntime-node is not installed: cd examples/clients && npm install onnxruntime-node")
    return found


@pytest.mark.parametrize("adapter", ["a", "b", None])
def test_node_answers_with_the_same_tokens(adapter: str | None, node: str, tiny_decoder: Path) -> None:
    bundle = decoder_bundle(tiny_decoder)
    with Runtime.open(bundle, threads=1) as runtime:
        ids = runtime.prompt_ids("hello there", adapter)
        (expected,) = runtime.generate(["hello there"], adapter, max_new_tokens=16)
        tokens = list(expected.token_ids)
    arguments = [str(bundle), adapter or "-", *map(str, ids)]
    done = subprocess.run([node, "generate.js", *arguments], cwd=CLIENTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == tokens
