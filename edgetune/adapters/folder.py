"""LoRA adapters through PEFT: put on a base, written to a folder, read back.

The folder is PEFT's own (`adapter_config.json`, `adapter_model.safetensors`) and loads in PEFT
unchanged; `edgetune_adapter.json` beside it says what PEFT has no field for: the base's digest,
labels, prompt format, hashes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save
from torch import Tensor, nn

from edgetune import __version__
from edgetune.core.adapter_codes import decode_file, is_coded, plain_config, unknown_layout
from edgetune.core.errors import AdapterError
from edgetune.core.files import sha256_file, whole_folder, write_json
from edgetune.core.format_version import format_version, unknown_version
from edgetune.core.layout import (
    ADAPTER_CONFIG,
    ADAPTER_METADATA,
    ADAPTER_WEIGHTS,
    HEAD_GUARDS,
    PEFT_PREFIX,
)
from edgetune.models.heads import HEAD, SequenceClassifier

PEFT_TASKS = {
    "text-generation": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "masked-lm": "FEATURE_EXTRACTION",
    "feature-extraction": "FEATURE_EXTRACTION",
    "reward": "SEQ_CLS",
}


@dataclass(frozen=True)
class AdapterMetadata:
    """`edgetune_adapter.json` without the hashes, which are computed when it is written."""

    base: Mapping[str, str]  # {"name", "digest"}
    task: str
    labels: tuple[str, ...] | None = None
    pooling: str | None = None
    # of sequence-classification: single-label | multi-label | regression
    problem: str | None = None
    # of a head on an encoder: transformers' own layers, or (None) one layer on the pooled states
    head: str | None = None
    prompt_format: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] | None = None
    max_length: int = 512  # tokens
    metrics: Mapping[str, Any] = field(default_factory=dict)
    # how the base's weights were rounded while it learned; None: not at all
    base_precision: Mapping[str, Any] | None = None
    # of labels: temperature and threshold, see `core.confidence`; None: not calibrated
    confidence: Mapping[str, Any] | None = None
    edgetune_version: str = __version__


def save_adapter(model: PeftModel, folder: Path, metadata: AdapterMetadata) -> None:
    """Write the adapter folder, whole or not at all; the same weights give the same bytes."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    contiguous = {
        name: tensors[name].detach().to("cpu", torch.float32).contiguous()
        for name in sorted(tensors)
    }
    with whole_folder(folder) as partial:
        (partial / ADAPTER_WEIGHTS).write_bytes(
            save(contiguous, metadata={"format": "pt"})
        )  # a full disk is then an OSError
        write_json(partial / ADAPTER_CONFIG, _config_dict(model, metadata))
        files = {name: sha256_file(partial / name) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)}
        write_metadata(partial, {**asdict(metadata), "files": files})


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write `edgetune_adapter.json`, in the version that its readers must know."""
    own = {name: value for name, value in metadata.items() if name != "schema"}
    write_json(folder / ADAPTER_METADATA, {"schema": format_version(own), **own})


def _config_dict(model: PeftModel, metadata: AdapterMetadata) -> dict[str, Any]:
    """PEFT's config as JSON, sets sorted, no machine path in it."""
    config = model.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = metadata.base["name"]
    config["inference_mode"] = True
    if HEAD in (config["modules_to_save"] or ()) and metadata.head is None:
        config["modules_to_save"] = [*config["modules_to_save"], *HEAD_GUARDS]
    return {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in sorted(config.items())
    }


def read_metadata(folder: Path) -> dict[str, Any]:
    """`edgetune_adapter.json`, its hashes verified against the files beside it."""
    path = folder / ADAPTER_METADATA
    try:
        metadata: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(
            f"{folder} is not an adapter that edgetune trained",
            expected=ADAPTER_METADATA,
            got="no such file",
            fix="Name a run folder or its adapter folder.",
        ) from error
    except ValueError as error:
        raise AdapterError(
            f"{path} is not JSON: {error}", fix="Train the adapter again."
        ) from error
    if not isinstance(metadata, dict) or (
        missing := sorted({"base", "files", "task"} - set(metadata))
    ):
        got = (
            f"none for {', '.join(missing)}"
            if isinstance(metadata, dict)
            else type(metadata).__name__
        )
        raise AdapterError(
            f"{path} is no adapter's description",
            expected="base, files, task …",
            got=got,
            fix="Train the adapter again.",
        )
    if (version := unknown_version(metadata.get("schema"))) is not None:
        raise AdapterError(f"{path}: {version}")
    for name, expected in metadata["files"].items():
        got = sha256_file(folder / name) if (folder / name).is_file() else "no such file"
        if got != expected:
            expected, got = (
                f"sha256 {expected[:16]}…",
                got if got == "no such file" else f"{got[:16]}…",
            )
            raise AdapterError(
                f"{folder / name} is damaged",
                expected=expected,
                got=got,
                fix="Copy it again from where it was trained.",
            )
    return metadata


def load_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """Put the adapter in `folder` on a base model, for inference; every tensor that does not fit is
    listed.
    """
    try:
        config = read_config(folder)
        guards = HEAD_GUARDS if isinstance(model, SequenceClassifier) and not model.layers else ()
        saved = [name for name in config.modules_to_save or () if name not in guards]
        config.modules_to_save = saved or None
        adapted = PeftModel(model, config)
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise AdapterError(f"PEFT cannot load this adapter: {error}", where=str(folder)) from error
    tensors = _without_copies(
        {peft_name(name): tensor for name, tensor in read_tensors(folder).items()},
        model,
        folder,
    )
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    problems = mismatches(expected, tensors)
    if problems:
        raise AdapterError(f"{folder} does not fit the base model", got="; ".join(problems))
    set_peft_model_state_dict(adapted, tensors)
    return adapted.eval()


def read_config(folder: Path) -> LoraConfig:
    """PEFT's configuration of an adapter folder, also of a small one, which PEFT itself refuses."""
    written = LoraConfig.from_json_file(str(folder / ADAPTER_CONFIG))
    if not is_coded(written):
        return LoraConfig.from_pretrained(str(folder))
    if (layout := unknown_layout(written)) is not None:
        raise ValueError(layout)
    config = LoraConfig.from_peft_type(**LoraConfig.check_kwargs(**plain_config(written)))
    for name, tensor in read_tensors(folder).items():
        module, is_a, _ = name.removeprefix(PEFT_PREFIX).partition(".lora_A.")
        if is_a and tensor.shape[0] != config.r:
            config.rank_pattern[f"^{re.escape(module)}"] = tensor.shape[0]
    config.alpha_pattern = dict(config.rank_pattern)
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of an adapter folder by their names in it; those of a small one decoded."""
    file = folder / ADAPTER_WEIGHTS
    if not is_coded(LoraConfig.from_json_file(str(folder / ADAPTER_CONFIG))):
        return load_file(file)
    return {name: torch.from_numpy(array) for name, array in decode_file(load_numpy(file)).items()}


def peft_name(name: str) -> str:
    """A tensor's name as PEFT saves it: other tools leave the adapter's name (`.default`) in, or
    the prefix out.
    """
    name = re.sub(
        r"\.(lora_[AB]|lora_embedding_[AB])\.default(?=\.|$)",
        r".\1",
        name.replace(".modules_to_save.default", ""),
    )
    return name if name.startswith(PEFT_PREFIX) else f"{PEFT_PREFIX}{name}"


def _without_copies(
    tensors: Mapping[str, Tensor], model: nn.Module, folder: Path
) -> dict[str, Tensor]:
    """Without the copies of frozen weights that PEFT saves beside an adapter on an embedding or
    output projection.

    AdapterError where such a copy is not what the base has: it was trained, or the vocabulary was
    extended.
    """
    own = model.state_dict()
    kept = dict(tensors)
    for name in [name for name in kept if name.endswith(".base_layer.weight")]:
        theirs, ours = kept.pop(name), own.get(name.removeprefix(PEFT_PREFIX))
        if (
            ours is None
            or ours.shape != theirs.shape
            or not torch.allclose(ours.float(), theirs.float(), atol=1e-2, rtol=1e-2)
        ):
            got = (
                "none here"
                if ours is None
                else (
                    f"shape {tuple(theirs.shape)}" if ours.shape != theirs.shape else "other values"
                )
            )
            raise AdapterError(
                f"{name} is not the base's own weight",
                where=str(folder),
                got=got,
                fix="Export it on the base it was trained on.",
            )
    return kept


def mismatches(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> list[str]:
    """What keeps the tensors of a file from being those that a model expects, one line each."""
    missing = [f"missing {name}" for name in sorted(expected.keys() - got.keys())]
    unknown = [f"unknown {name}" for name in sorted(got.keys() - expected.keys())]
    shapes = [
        f"{name} has shape {tuple(got[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & got.keys())
        if expected[name].shape != got[name].shape
    ]
    return missing + unknown + shapes
