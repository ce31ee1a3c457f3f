"""A PEFT LoRA folder, or a small one with codes, read with numpy alone: per-module A and scaled B,
the task head, and what cannot be used.

Semantics follow PEFT (`peft.utils.get_pattern_key`, `peft.tuners.lora`): scaling = alpha / r, or
alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732); a pattern key is a regular
expression on the end of a name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.core.adapter_codes import is_coded, plain_config, unknown_layout
from edgetune.core.arrays import Array
from edgetune.core.errors import AdapterError, listed
from edgetune.core.files import is_regular, read_hashed_json, sha256_file
from edgetune.core.format_version import unknown_version
from edgetune.core.layout import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_METADATA,
    ADAPTER_WEIGHTS,
    PEFT_PREFIX,
)
from edgetune.runtime.adapters.json_types import wrong_config, wrong_metadata
from edgetune.runtime.adapters.patterns import fullmatch, matches_end
from edgetune.runtime.adapters.tensor_file import TensorFile, is_finite

LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
HEAD_NAMES = ("classifier", "score", "pooler", "head", "pre_classifier")
HEAD = re.compile(
    rf"(?:\w+\.)?(?P<name>{'|'.join(HEAD_NAMES)})(?:\.modules_to_save(?:\.default)?)?"
    r"(?P<part>(?:\.(?:dense|norm|out_proj))?\.(?:weight|bias))"
)
COPY = ".base_layer.weight"
NUMBER = re.compile(r"\.([0-9]{1,9})(?=\.)")
"""a layer's, inside a module's name"""
NOT_FINITE = "holds NaN or infinite values"
LARGE = 64 << 20
"""Bytes of weights above which unknown tensors are refused by the header alone."""
# Configurations whose answer is not W + scaling·BA. Each says what to do instead.
REFUSED = {
    "use_dora": "DoRA rescales whole weights, which adapter inputs cannot; train with dora = false",
    "lora_bias": "the LoRA layers carry biases; train with lora_bias = False",
    "trainable_token_indices": (
        "trained token embeddings have no graph input; train without trainable tokens"
    ),
    "target_parameters": "adapters on bare parameters have no graph input; target modules instead",
    "layer_replication": (
        "replicated layers are another base model; merge it in torch and export that"
    ),
    "alora_invocation_tokens": "activated LoRA switches inside a prompt; train plain LoRA",
    "use_qalora": "QA-LoRA pools its input in groups; train plain LoRA",
    "use_bdlora": "block-diagonal LoRA has other tensors; train plain LoRA",
    "arrow_config": "Arrow routes between adapters; export each adapter by itself",
    "kasa_config": "KaSA changes the base weights; train plain LoRA",
    "monteclora_config": "MonteCLoRA samples its weights; train plain LoRA",
}
# These initialisations subtract the start value from the base weights, so W + scaling·BA is not
# what was trained.
REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass
class LoraFolder:
    """What a PEFT folder holds. `problems` lists everything that keeps it from being used, one line
    each.
    """

    path: Path
    config: dict[str, Any]
    metadata: dict[str, Any] | None
    digest: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    """name → sha256 (hex) of the very bytes that all this was made of"""
    deltas: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    """module → A (r, in) float32 and scaling·B (out, r) float32"""
    head: dict[str, Array] = field(default_factory=dict)
    """the head's tensors, by their names in transformers without the body's: `classifier.weight`
    (labels, hidden), `classifier.bias` (labels,), `pooler.dense.weight` …
    """
    head_deltas: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    """the same as `deltas`, of the head's dense layer"""
    copies: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """module → shape of the frozen base weight that PEFT saves beside an adapter on an output
    projection
    """
    problems: list[str] = field(default_factory=list)
    modules: set[str] | None = None
    """every module the file names, usable or not; None when the file could not be read"""
    coded: bool = False
    """a small adapter: its shapes say the ranks, and scaling is 1"""

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max((a.shape[0] for a, _ in self.deltas.values()), default=0)


def read_lora(
    folder: str | Path, *, base_digest: str | None = None, max_bytes: int | None = None
) -> LoraFolder:
    """Read a PEFT folder; AdapterError when its JSON files are none of a LoRA's at all, else see
    `.problems`. Weights of more than `max_bytes` are not read.
    """
    path = Path(folder)
    files: dict[str, str] = {}
    written = _read_json(path, ADAPTER_CONFIG, files, required=True) or {}
    config = plain_config(written)
    metadata = _read_json(path, ADAPTER_METADATA, files, required=False)
    refuse_if(wrong_types(config, metadata or {}), path)
    read = LoraFolder(
        path=path, config=config, metadata=metadata, files=files, coded=is_coded(written)
    )
    if (layout := unknown_layout(written)) is not None:
        read.problems.append(f"{ADAPTER_CONFIG}: {layout}")
    read.problems += _config_problems(read.config)
    weights, place = path / ADAPTER_WEIGHTS, len(read.problems)
    with ThreadPoolExecutor(
        1
    ) as beside:  # hashing takes half of the time, and another core can do it
        try:
            file = TensorFile(weights)
            _check_header(file, max_bytes)
            file.read()
            digest = beside.submit(file.digest)
            _sort_tensors(file, read)
            files[ADAPTER_WEIGHTS] = read.digest = digest.result()
        except FileNotFoundError:
            read.problems.append(f"{ADAPTER_WEIGHTS}: missing")
        except OSError as error:
            read.problems.append(f"{ADAPTER_WEIGHTS}: cannot be read: {error.strerror}")
        except ValueError as error:
            read.problems.append(f"{ADAPTER_WEIGHTS}: {error}")
    if metadata is not None:  # said first: another base explains every other misfit
        read.problems[place:place] = _metadata_problems(read, metadata, base_digest)
    return read


def wrong_types(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[str]:
    """A line for each value of a folder's JSON files that nothing could be made of."""
    own = [f"{ADAPTER_METADATA}: {line}" for line in wrong_metadata(metadata)]
    if config.get("peft_type") != "LORA":
        return own
    return [f"{ADAPTER_CONFIG}: {line}" for line in wrong_config(config)] + own


def refuse_if(problems: Sequence[str], path: Path) -> None:
    """Raise one AdapterError that says the problem; several stand on a line of their own each."""
    if problems:
        what = f"the adapter cannot be used, nothing was loaded: {listed(problems, 'mismatches')}"
        raise AdapterError(what, where=str(path))


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r (rsLoRA: alpha / sqrt(r)) of one module, with `alpha_pattern` honoured."""
    alpha = float(_pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank the configuration gives one module, with `rank_pattern` honoured."""
    return int(_pattern_value(config.get("rank_pattern"), module, config.get("r", 8)))


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would put an adapter on this module (`check_target_module_exists`)."""
    if _names(config.get("exclude_modules"), module):
        return False
    if any(f".{name}." in f".{module}." for name in config.get("modules_to_save") or ()):
        return False
    target = config.get("target_modules")
    if target == "all-linear":
        return True
    return _names(target, module) and _layer_is_chosen(config, module)


def _layer_is_chosen(config: Mapping[str, Any], module: str) -> bool:
    """`layers_to_transform`: None, one layer number or a list of them."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(config.get("target_modules"), str):
        return True
    chosen = [layers] if isinstance(layers, int) else layers
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for number in NUMBER.finditer(module):
            if matches_end(pattern, module[: number.start()]):
                return int(number[1]) in chosen
    return False


def _names(names: str | Sequence[str] | None, module: str) -> bool:
    """PEFT's rule: a string is a regular expression on the whole name, a list holds names or their
    ends.
    """
    if not names:
        return False
    if isinstance(names, str):
        return fullmatch(names, module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if matches_end(key, module):
            return value
    return default


def _read_json(
    folder: Path, name: str, files: dict[str, str], *, required: bool
) -> dict[str, Any] | None:
    """A file's object; its sha256 goes into `files`. None where there is none and none is asked."""
    path = folder / name
    if not os.path.lexists(path):
        if not required:
            return None
        inside = folder / ADAPTER  # of a run of `edgetune train`
        fix = f"Give {inside}, or another" if is_regular(inside / name) else "Give a"
        fix += f" PEFT adapter folder: one with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}."
        raise AdapterError(
            f"no {name} here" if _is_folder(folder) else "no such folder",
            where=str(folder),
            fix=fix,
        )
    value, files[name] = read_hashed_json(path, error=AdapterError)
    if not isinstance(value, dict):
        raise AdapterError("not a JSON object", where=str(path), got=type(value).__name__)
    return value


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that no folder can have
        return False


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"{ADAPTER_CONFIG}: peft_type: expected LORA, got {kind}"]
    problems = [
        f"{ADAPTER_CONFIG}: {key}: {reason}" for key, reason in REFUSED.items() if config.get(key)
    ]
    if config.get("bias", "none") != "none":
        problems.append(
            f"{ADAPTER_CONFIG}: bias: expected none, got {config['bias']}; trained biases have no"
            " graph input"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(REFUSED_INITS):
        fix = "save it with path_initial_model_for_weight_conversion"
        problems.append(
            f"{ADAPTER_CONFIG}: init_lora_weights={start} also changed the base weights; {fix}"
        )
    for name in config.get("modules_to_save") or ():
        if name not in HEAD_NAMES:
            problems.append(
                f"{ADAPTER_CONFIG}: modules_to_save: the graph takes no trained {name!r}; only a"
                " classifier's layers swap"
            )
    return problems


def _metadata_problems(
    read: LoraFolder, metadata: Mapping[str, Any], base_digest: str | None
) -> list[str]:
    problems = []
    if (version := unknown_version(metadata.get("schema"))) is not None:
        problems.append(f"{ADAPTER_METADATA}: {version}")
    base = metadata.get("base") or {}
    if base_digest is not None and base.get("digest") != base_digest:
        got = f"{base.get('name', '?')} {str(base.get('digest'))[:23]}…"
        problems.append(
            f"{ADAPTER_METADATA}: base model: expected digest {base_digest[:23]}…, got {got}"
        )
    for name, expected in (metadata.get("files") or {}).items():
        file = read.path / Path(name).name
        if file.name == ADAPTER_WEIGHTS and read.digest is None:
            continue  # missing or damaged: reported by itself
        if not is_regular(file):
            problems.append(f"{name:.80}: missing")
            continue
        got = (
            read.digest
            if file.name == ADAPTER_WEIGHTS and read.digest is not None
            else sha256_file(file)
        )
        if got != expected:
            problems.append(
                f"{name}: sha256: expected {str(expected)[:16]}…, got {got[:16]}…; copy it again"
            )
    return problems


def _sort_tensors(file: TensorFile, read: LoraFolder) -> None:
    """Put every tensor where it belongs: a delta, the head, or a problem."""
    sides: dict[str, dict[str, Array]] = {}
    not_finite = file.not_finite()  # raises where the file cannot be read
    read.modules = set()
    for key, tensor in file.tensors.items():
        name = key.removeprefix(PEFT_PREFIX)
        if match := LORA.fullmatch(name):
            sides.setdefault(match["module"], {})[match["side"]] = tensor
            read.modules.add(match["module"])
        elif match := HEAD.fullmatch(name):
            read.head[match["name"] + match["part"]] = tensor
        elif name.endswith(COPY):
            read.copies[name.removesuffix(COPY)] = tensor.shape
        else:
            read.problems.append(f"{key} {tensor.shape}: unknown, {_why_unknown(name)}")
        if key in not_finite:
            read.problems.append(f"{key}: {NOT_FINITE}")
    for module, pair in sides.items():
        problem = _pair_problem(read, module, pair)
        if problem:
            read.problems.append(problem)
        else:
            a, b = pair["A"], pair["B"]
            scaling = 1.0 if read.coded else scaling_of(read.config, module, a.shape[0])
            with np.errstate(over="ignore"):
                scaled = b * np.float32(scaling)
            if is_finite(b) and not is_finite(scaled):
                read.problems.append(f"{module}.lora_B.weight: times alpha / r it {NOT_FINITE}")
            read.deltas[module] = (a, scaled)


def _check_header(file: TensorFile, max_bytes: int | None) -> None:
    """ValueError for a large file that the header alone shows to be no adapter's."""
    if max_bytes is not None and file.nbytes > max_bytes:
        raise ValueError(f"expected at most {max_bytes} bytes for this base, got {file.nbytes}")
    if file.nbytes > LARGE and (unknown := [key for key in file.shapes if not _is_known(key)]):
        raise ValueError(f"{len(unknown)} unknown tensors, such as {unknown[0]:.100}")


def _is_known(key: str) -> bool:
    name = key.removeprefix(PEFT_PREFIX)
    return bool(LORA.fullmatch(name) or HEAD.fullmatch(name)) or name.endswith(COPY)


def _pair_problem(read: LoraFolder, module: str, pair: Mapping[str, Array]) -> str | None:
    for side in "AB":
        if side not in pair:
            return f"{module}.lora_{side}.weight: missing"
        if pair[side].ndim != 2:
            return (
                f"{module}.lora_{side}.weight: expected 2 dimensions, got {pair[side].shape}; only"
                " linear layers"
            )
    a, b = pair["A"], pair["B"]
    rank = a.shape[0] if read.coded else rank_of(read.config, module)
    if a.shape[0] != rank:
        return f"{module}.lora_A.weight: expected {(rank, a.shape[1])} (rank {rank}), got {a.shape}"
    if b.shape[1] != rank:
        return f"{module}.lora_B.weight: expected {(b.shape[0], rank)} (rank {rank}), got {b.shape}"
    return None


def _why_unknown(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "a DoRA magnitude; train with dora = false"
    if "lora_embedding_" in name or "embed_tokens" in name or "word_embeddings" in name:
        return "embeddings have no adapter input; target linear layers only"
    if ".lora_B.bias" in name or name.endswith(".bias"):
        return "trained biases have no graph input; train with bias = none"
    if name.startswith(HEAD_NAMES):
        return "no layer of a classifier that is known here"
    return "the graph has no input for it"
