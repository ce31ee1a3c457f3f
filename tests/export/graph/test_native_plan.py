"""The native plan of every family that has one, run by numpy: it answers as torch and as ONNX
Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_helpers import make_adapter
from family_helpers import make_family, some
from native_helpers import Array, PlanRun, exact_logits

from edgetune.adapters.folder import load_adapter
from edgetune.export.bundle import build_base
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.bundle.manifest import Manifest

TAKEN = {
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "llama": {},
    "mistral": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {},
}
COPIES = {"llama", "gemma", "mistral"}
PRECISIONS = {
    "fp32": Precision("fp32"),
    "int8": Precision("int8"),
    "int4": Precision("int4", overrides={"lm_head": "int8"}),
}
IDS = np.random.default_rng(0).integers(5, 300, 23).tolist()


@dataclass
class Family:
    """A tiny model, its adapter, and bundles without proof in every precision."""

    base: Path
    adapter: Path
    folder: Path

    def build(self, precision: Precision, name: str) -> tuple[Path, Manifest]:
        out = self.folder / name
        out.mkdir()
        return out, build_base(resolve_base(str(self.base)), out, precision=precision)

    def torch_logits(self, *, adapter: bool) -> Array:
        model: Any = load_body(resolve_base(str(self.base)))
        if adapter:
            model = load_adapter(model, self.adapter)
        with torch.no_grad():
            return np.asarray(model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0])


def make(name: str, like: Path, folder: Path, **values: Any) -> Family:
    base = make_family(name, like, folder / name, **values)
    return Family(base, make_adapter(base, folder / "adapter", strength=0.2), folder)


@pytest.fixture(scope="module", params=some(TAKEN, fast=set(TAKEN) - COPIES))
def family(request: Any, tiny_decoder: Path, tmp_path_factory: Any) -> Family:
    return make(request.param, tiny_decoder, tmp_path_factory.mktemp("family"))


def close(got: Array, expected: Array, tolerance: float = 1e-4) -> None:
    """Within a share of the largest logit."""
    assert got.shape == expected.shape
    worst = np.abs(got - expected).max()
    assert worst <= tolerance * max(1.0, np.abs(expected).max()), worst


def test_in_float_it_answers_as_torch_with_and_without_adapter(family: Family) -> None:
    bundle, manifest = family.build(PRECISIONS["fp32"], "torch")
    run = PlanRun.open(bundle, manifest)
    adapted = run.with_adapter(pack_adapter(family.adapter, manifest).tensors).logits(IDS)
    close(run.logits(IDS), family.torch_logits(adapter=False))
    close(adapted, family.torch_logits(adapter=True))
    assert np.abs(adapted - run.logits(IDS)).max() > 0.1


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_in_blocks_it_answers_as_the_graph(family: Family, precision: str) -> None:
    bundle, manifest = family.build(PRECISIONS[precision], precision)
    run = PlanRun.open(bundle, manifest)
    tensors = pack_adapter(family.adapter, manifest).tensors
    close(run.logits(IDS), exact_logits(bundle, manifest, IDS, {}))
    close(run.with_adapter(tensors).logits(IDS), exact_logits(bundle, manifest, IDS, tensors))
