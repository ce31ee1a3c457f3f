"""A model whose weights all learned: a base of its own, in a folder that transformers loads.

`model/` holds config, safetensors and the base's tokenizer files, and `edgetune_model.json` says
what it was trained to do. A classifier's head is no part of a base: it lies beside it as an adapter
(`adapter/`) that has nothing but the head.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgetune.adapters.folder import AdapterMetadata, save_adapter
from edgetune.adapters.lora import adapt_head
from edgetune.core.errors import AdapterError
from edgetune.core.files import output_errors, write_json
from edgetune.core.format_version import format_version, unknown_version
from edgetune.core.layout import ADAPTER, MODEL, MODEL_METADATA, TOKENIZER_FILES
from edgetune.models.base import Base, digest_of, open_folder
from edgetune.models.heads import Embedder, SequenceClassifier
from edgetune.models.load import quiet
from edgetune.models.sentence_encoder import sentence_files

BESIDE = (  # files of the base that are not the model's own
    *TOKENIZER_FILES,
    "vocab.txt",
    "generation_config.json",
)


def save_full(model: Any, run: Path, *, final: Path, base: Base, metadata: AdapterMetadata) -> None:
    """Write `run`/model (and for a classifier `run`/adapter); `final` is the run folder's name once
    it is complete.
    """
    folder = run / MODEL
    body: Any = model.body if isinstance(model, (Embedder, SequenceClassifier)) else model
    with output_errors(folder), quiet():
        body.save_pretrained(folder)
        for name in (*BESIDE, *sentence_files(base.folder)):
            if (base.folder / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(base.folder / name, folder / name)
    own = asdict(metadata)
    write_json(folder / MODEL_METADATA, {"schema": format_version(own), **own})
    if isinstance(model, SequenceClassifier):
        own = {"name": str(final.absolute() / MODEL), "digest": digest_of(folder)}
        save_adapter(adapt_head(model), run / ADAPTER, replace(metadata, base=own))


def full_folder(folder: Path) -> Path | None:
    """The model folder of such a run; None for a run with an adapter and for anything else."""
    if (folder / MODEL / MODEL_METADATA).is_file() and not (folder / ADAPTER).is_dir():
        return folder / MODEL
    return folder if (folder / MODEL_METADATA).is_file() else None


def read_full(folder: Path) -> tuple[Base, dict[str, Any]]:
    """The model as a base, and what `edgetune_model.json` says."""
    path = folder / MODEL_METADATA
    try:
        metadata: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{path} cannot be read: {error}", fix="Train the model again."
        ) from error
    if not isinstance(metadata, dict) or (
        missing := {"base", "task", "labels", "prompt_format"} - set(metadata)
    ):
        got = (
            f"none for {', '.join(sorted(missing))}"
            if isinstance(metadata, dict)
            else type(metadata).__name__
        )
        raise AdapterError(
            f"{path} is no model's description",
            expected="base, task …",
            got=got,
            fix="Train the model again.",
        )
    if (version := unknown_version(metadata.get("schema"))) is not None:
        raise AdapterError(f"{path}: {version}")
    return open_folder(folder.absolute(), name=str(folder.absolute())), metadata


def own_base(adapter: Path, digest: str) -> Base | None:
    """The model that lies beside an adapter folder, when it is the one of this digest: a run may
    have been moved.
    """
    folder = adapter.parent / MODEL
    if not (folder / MODEL_METADATA).is_file():
        return None
    base = open_folder(folder.absolute(), name=str(folder.absolute()))
    return base if base.digest == digest else None
