"""Adapters with every kind of head on the tiny encoder, with a known, large effect."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from export_helpers import export

from edgetune.adapters import AdapterMetadata, adapt, adapt_head, save_adapter
from edgetune.bases import load_body, resolve_base
from edgetune.recipe import Parameters
from edgetune.token_classifier import build_classifier

ROOMS_TAGS = ("B-room", "I-room", "O")
PARTS = ("DET", "NOUN", "PUNCT", "VERB", "X")
TAGGING, CLASSIFICATION = "token-classification", "sequence-classification"
HEADS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "rooms": (TAGGING, None, ROOMS_TAGS),
    "parts": (TAGGING, None, PARTS),
    "intent": (CLASSIFICATION, "single-label", ("low", "high", "none")),
    "topics": (CLASSIFICATION, "multi-label", ("lights", "music", "rooms")),
    "warmth": (CLASSIFICATION, "regression", ("value",)),
}


def make_head(base_folder: Path, folder: Path, *, seed: int = 0, head_only: bool = False) -> Path:
    """The adapter that HEADS has under the folder's name, as the trainer writes it; its weights are random."""
    task, problem, labels = HEADS[folder.name]
    torch.manual_seed(seed)
    base = resolve_base(str(base_folder))
    model = build_classifier(load_body(base), task=task, labels=len(labels), pooling=base.pooling)
    adapted = adapt_head(model) if head_only else adapt(model, Parameters(rank=4), task=task)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name or "classifier.modules_to_save.default" in name:
                weight.normal_(std=0.2)
    metadata = AdapterMetadata(
        base={"name": base.name, "digest": base.digest}, task=task, labels=labels, problem=problem, pooling=base.pooling, max_length=32
    )
    save_adapter(adapted, folder, metadata)
    return folder


@cache
def adapters(base: Path) -> dict[str, Path]:
    """One adapter of each kind; `parts` is a head alone."""
    root = base.parent / f"{base.name}-heads"
    return {name: make_head(base, root / name, seed=seed, head_only=name == "parts") for seed, name in enumerate(HEADS)}


@cache
def bundle(base: Path) -> Path:
    """All of them on one fp32 encoder."""
    out = base.parent / f"{base.name}-heads-bundle"
    export(out, *adapters(base).values())
    return out


@cache
def merged(base: Path) -> Path:
    """`rooms` merged into the weights."""
    out = base.parent / f"{base.name}-heads-merged"
    export(out, adapters(base)["rooms"], mode="merged")
    return out
