"""Adapters with a known, large effect on the tiny models, and the plain ONNX Runtime way of running a bundle."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetune.adapters import AdapterMetadata, adapt, save_adapter
from edgetune.bases import load_body, resolve_base
from edgetune.export.bundle import export_bundle
from edgetune.export.lower import Precision
from edgetune.heads import SequenceClassifier
from edgetune.recipe import Parameters
from edgetune.runtime.manifest import Manifest


def make_adapter(base_folder: Path, folder: Path, *, seed: int = 0, strength: float = 0.2, **parameters: Any) -> Path:
    """A PEFT folder as the trainer writes it; B is random instead of trained."""
    torch.manual_seed(seed)
    base = resolve_base(str(base_folder))
    model, labels, task = load_body(base), None, "text-generation"
    if base.kind == "encoder":
        labels, task = ("low", "high", "none"), "sequence-classification"
        model = SequenceClassifier(model, labels=3, pooling=base.pooling or "mean")
    adapted = adapt(model, Parameters(**{"rank": 4, **parameters}), task=task)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name or name.endswith("classifier.modules_to_save.default.weight"):
                weight.normal_(std=strength)
    metadata = AdapterMetadata(base={"name": base.name, "digest": base.digest}, task=task, labels=labels, pooling=base.pooling)
    save_adapter(adapted, folder, metadata)
    return folder


def export(out: Path, *adapters: Path, precision: str = "fp32", mode: str = "separate", **options: Any) -> Manifest:
    """Export adapters under their folders' names."""
    return export_bundle([(a.name, a) for a in adapters], out, mode=mode, precision=Precision(precision, **options), threads=1)


def op_counts(bundle: Path) -> Counter[str]:
    """How many nodes of each kind the engine's graph has."""
    import onnx

    return Counter(node.op_type for node in onnx.load(str(bundle / "engine.onnx"), load_external_data=False).graph.node)


def plain_session(bundle: Path) -> Any:
    """`model.onnx` in ONNX Runtime, as somebody without edgetune opens it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])


def decoder_feed(bundle_manifest: Manifest, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of the standard graph for a first prompt: an empty cache."""
    graph = bundle_manifest.graph
    empty = np.zeros((len(ids), graph.kv_heads or 0, 0, graph.head_dim or 0), np.float32)
    cache = {f"past_key_values.{i}.{side}": empty for i in range(graph.layers or 0) for side in ("key", "value")}
    return {"input_ids": ids, "attention_mask": mask, **cache}
