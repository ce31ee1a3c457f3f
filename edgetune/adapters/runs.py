"""Run folders: their layout, and reading them back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgetune.adapters.folder import load_adapter, read_metadata
from edgetune.adapters.full_model import full_folder, own_base, read_full
from edgetune.core.errors import AdapterError, OutputError
from edgetune.core.layout import ADAPTER, ADAPTER_METADATA, LAYOUT, SUMMARY
from edgetune.core.tasks import EMBEDDING
from edgetune.models.base import Base
from edgetune.models.heads import Embedder, RewardModel, build_classifier
from edgetune.models.load import load_body, load_tokenizer
from edgetune.models.masked_lm import load_masked_lm
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import trained_precision


def load_adapted_model(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """(torch model with the adapter on, tokenizer, metadata) of a run folder or an adapter folder.

    A run that trained all weights has a model instead, which is loaded as it is.
    """
    if (own := full_folder(folder)) is not None:
        base, metadata = read_full(own)
        model = (
            load_masked_lm(base, seed=0)[0] if metadata["task"] == "masked-lm" else load_body(base)
        )
        if metadata["task"] == EMBEDDING:
            model = Embedder(model, pooling=metadata["pooling"] or "mean")
        return model, load_tokenizer(base), metadata
    adapter_dir = find_adapter(folder)
    metadata = read_metadata(adapter_dir)
    base = _base_of(metadata, adapter_dir)
    # The masked-lm head is not the adapter's: the checkpoint's own is used, or an untrained one.
    model = load_masked_lm(base, seed=0)[0] if metadata["task"] == "masked-lm" else load_body(base)
    if metadata["labels"] is not None:
        model = build_classifier(
            model,
            task=metadata["task"],
            labels=len(metadata["labels"]),
            pooling=metadata["pooling"],
            head=metadata.get("head"),
        )
    elif metadata["task"] == "reward":
        model = RewardModel(model)
    elif metadata["task"] == EMBEDDING:
        model = Embedder(model, pooling=metadata["pooling"] or "mean")
    return load_adapter(model, adapter_dir), load_tokenizer(base), metadata


def find_adapter(folder: Path) -> Path:
    """The adapter folder of a run folder, or the folder itself when it is one."""
    if not folder.is_dir():
        raise AdapterError(
            "there is no such folder",
            where=str(folder),
            expected="a run folder or an adapter folder",
        )
    adapter_dir = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
    if not (adapter_dir / ADAPTER_METADATA).is_file():
        raise AdapterError(
            "this is neither a run nor an adapter that edgetune trained",
            where=str(folder),
            expected=ADAPTER_METADATA,
        )
    return adapter_dir


def check_replaceable(folder: Path, *, finished: bool) -> None:
    """A new run may take the place of an older one, but never of a folder that holds anything
    else; `finished`: also where the older one is finished.
    """
    if not finished and (folder / SUMMARY).is_file():
        raise OutputError(
            "a finished run is there already",
            where=str(folder),
            fix="Add --replace to put the new one in its place, or choose another --out.",
        )
    if folder.is_dir():
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in LAYOUT)
        if foreign:
            raise OutputError(
                "the output folder holds other files, which a run would replace",
                where=str(folder),
                expected="a new folder, an empty one or an older run",
                got=", ".join(foreign[:5]),
                fix="Choose another --out.",
            )
    elif folder.exists():
        raise OutputError(
            "the output is a file",
            where=str(folder),
            expected="a folder",
            fix="Choose another --out.",
        )


def _base_of(metadata: dict[str, Any], adapter_dir: Path) -> Base:
    digest = metadata["base"]["digest"]
    base = own_base(adapter_dir, digest) or resolve_base(metadata["base"]["name"])
    if base.digest != metadata["base"]["digest"]:
        raise AdapterError(
            f"the adapter was trained for another version of {base.name}",
            where=str(adapter_dir),
            expected=metadata["base"]["digest"],
            got=base.digest,
        )
    recorded = metadata.get("base_precision")
    return (
        base
        if recorded is None
        else replace(base, precision=trained_precision(recorded, where=str(adapter_dir)))
    )
