"""LoRA adapters through PEFT: put on a base, written to a folder, read back.

The folder is PEFT's own (`adapter_config.json`, `adapter_model.safetensors`) and loads in PEFT unchanged;
`edgetune_adapter.json` beside it says what PEFT has no field for: the base's digest, labels, prompt format, hashes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import load_file, save
from torch import Tensor, nn

from edgetune import __version__
from edgetune.errors import AdapterError, RecipeError
from edgetune.files import sha256_file, whole_folder, write_json
from edgetune.heads import HEAD, HEADS, UNUSED, SequenceClassifier, head_of
from edgetune.recipe import Parameters
from edgetune.recipe_checks import changes_the_base
from edgetune.token_classifier import TokenClassifier

CONFIG, WEIGHTS, METADATA = "adapter_config.json", "adapter_model.safetensors", "edgetune_adapter.json"
PREFIX = "base_model.model."
SCHEMA = 1
ALL_LINEAR = "all-linear"
TASKS = {
    "text-generation": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "masked-lm": "FEATURE_EXTRACTION",
    "reward": "SEQ_CLS",
}


@dataclass(frozen=True)
class AdapterMetadata:
    """`edgetune_adapter.json` without the hashes, which are computed when it is written."""

    base: Mapping[str, str]  # {"name", "digest"}
    task: str
    labels: tuple[str, ...] | None = None
    pooling: str | None = None
    problem: str | None = None  # of sequence-classification: single-label | multi-label | regression
    prompt_format: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] | None = None
    max_length: int = 512  # tokens
    metrics: Mapping[str, Any] = field(default_factory=dict)
    base_precision: Mapping[str, Any] | None = None  # how the base's weights were rounded while it learned; None: not at all
    edgetune_version: str = __version__


def adapt(model: nn.Module, parameters: Parameters, *, task: str) -> PeftModel:
    """Put a fresh adapter on `model`: base frozen, adapter (and head) trainable, ΔW = 0 at the start (before `loftq`)."""
    names = within(target_names(model, parameters.target_modules), parameters.layers)
    for table, pattern in (("rank_pattern", parameters.rank_pattern), ("alpha_pattern", parameters.alpha_pattern)):
        _check_pattern(pattern, names, table=table)
    head = head_of(model)
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else TASKS[task],  # type: ignore[union-attr]
        r=parameters.rank,
        lora_alpha=_whole(parameters.alpha),
        lora_dropout=parameters.dropout,
        target_modules=names,
        use_rslora=parameters.rslora,
        use_dora=parameters.dora,
        rank_pattern=dict(parameters.rank_pattern),
        alpha_pattern={name: _whole(alpha) for name, alpha in parameters.alpha_pattern.items()},
        modules_to_save=None if head is None else [head],
        init_lora_weights=True if parameters.init in ("default", "loftq") else parameters.init,
        fan_in_fan_out=all(type(model.get_submodule(name)).__name__ == "Conv1D" for name in names),  # GPT-2's weights lie (in, out)
    )
    if parameters.init == "orthogonal" and (odd := _odd_ranks(parameters)):
        raise RecipeError('init = "orthogonal" needs an even rank', where="parameters.init", got=f"rank {odd}")
    if changes_the_base(parameters.init) or parameters.init == "loftq":
        _check_ranks(model, names, parameters)
    return PeftModel(model, config)


def adapt_head(model: SequenceClassifier) -> PeftModel:
    """`model` with its head trainable and everything else frozen, in the form of an adapter without low-rank weights.

    "dummy-target-modules" is PEFT's own word for a LoRA configuration that targets nothing
    (`peft.utils.constants.DUMMY_TARGET_MODULES`), so the saved folder loads in PEFT unchanged.
    """
    task = "TOKEN_CLS" if isinstance(model, TokenClassifier) else "SEQ_CLS"
    config = LoraConfig(task_type=task, r=1, lora_alpha=1, target_modules=DUMMY_TARGET_MODULES, modules_to_save=[HEAD])
    return PeftModel(model, config)


def within(names: list[str], layers: tuple[int, ...] | None) -> list[str]:
    """The modules of layers first … last; a module's layer is the first number in its name."""
    if layers is None:
        return names
    numbers = {name: next((int(part) for part in name.split(".") if part.isdecimal()), None) for name in names}
    last = max((number for number in numbers.values() if number is not None), default=-1)
    if layers[1] > last:
        raise RecipeError("the range goes beyond the last layer", where="parameters.layers", expected=f"at most {last}", got=str(layers[1]))
    return [name for name, number in numbers.items() if number is not None and layers[0] <= number <= layers[1]]


def _odd_ranks(parameters: Parameters) -> int | None:
    return next((rank for rank in (parameters.rank, *parameters.rank_pattern.values()) if rank % 2), None)


def _check_ranks(model: nn.Module, names: list[str], parameters: Parameters) -> None:
    """PiSSA, OLoRA and LoftQ have no more directions than the weight has rows or columns."""
    largest = max(parameters.rank, *parameters.rank_pattern.values(), 1)
    for name in names:
        weight: Any = model.get_submodule(name).weight
        if largest > min(weight.shape):
            raise RecipeError(
                f'init = "{parameters.init}" needs a rank of at most the smaller side of each weight', where="parameters.rank",
                expected=f"at most {min(weight.shape)} for {name}", got=str(largest),
            )  # fmt: skip


def target_names(model: nn.Module, target_modules: str | tuple[str, ...]) -> list[str]:
    """The full names of the linear modules that get an adapter.

    `target_modules` is "all-linear", a regular expression over full names (a string), or a list of names, each of which
    matches a module of that name or whose name ends in `.name`; as in PEFT.
    """
    linears = dict(_linears(model))
    if target_modules == ALL_LINEAR:
        return list(linears)
    if isinstance(target_modules, str):
        pattern = _pattern(target_modules, where="parameters.target_modules")
        found = [name for name in linears if pattern.fullmatch(name)]
        unmatched = [] if found else [target_modules]
    else:
        found = [name for name in linears if any(_ends_in(name, wanted) for wanted in target_modules)]
        unmatched = [wanted for wanted in target_modules if not any(_ends_in(name, wanted) for name in linears)]
    if unmatched or not found:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise RecipeError(
            f"target_modules {', '.join(map(repr, unmatched)) or '[]'} matches no linear layer of this base",
            where="parameters.target_modules",
            fix=f"There are: {', '.join(kinds)}; or \"{ALL_LINEAR}\" for all.",
        )
    return found


def _check_pattern(pattern: Mapping[str, float], names: list[str], *, table: str) -> None:
    """PEFT passes over a pattern that matches nothing; here that is an error."""
    for key in pattern:
        _pattern(key, where=f"parameters.{table}")
        if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):
            raise RecipeError(f"{key!r} matches no target module", where=f"parameters.{table}", got=key)


def _pattern(text: str, *, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise RecipeError(f"not a regular expression: {error}", where=where, got=text) from error


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers of the body: not the output projection, not the head, not an unused pooler."""
    body = f"{getattr(model, 'base_model_prefix', '')}."
    in_body = body if hasattr(model, body[:-1]) and body != "." else ""
    find_output: Any = getattr(model, "get_output_embeddings", None)
    output = find_output() if find_output is not None else None
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and module is not output and name.startswith(in_body) and not set(name.split(".")) & {*HEADS, *UNUSED}:
            yield name, module


def _ends_in(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _whole(number: float) -> float | int:
    """16.0 → 16: PEFT's own type for alpha is int, and other readers of its file expect that."""
    return int(number) if float(number).is_integer() else number


def save_adapter(model: PeftModel, folder: Path, metadata: AdapterMetadata) -> None:
    """Write the adapter folder, whole or not at all; the same weights give the same bytes."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    contiguous = {name: tensors[name].detach().to("cpu", torch.float32).contiguous() for name in sorted(tensors)}
    with whole_folder(folder) as partial:
        (partial / WEIGHTS).write_bytes(save(contiguous, metadata={"format": "pt"}))  # a full disk is then an OSError
        write_json(partial / CONFIG, _config_dict(model, metadata))
        files = {name: sha256_file(partial / name) for name in (WEIGHTS, CONFIG)}
        write_json(partial / METADATA, {"schema": SCHEMA, **asdict(metadata), "files": files})


def _config_dict(model: PeftModel, metadata: AdapterMetadata) -> dict[str, Any]:
    """PEFT's config as JSON, sets sorted, no machine path in it."""
    config = model.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = metadata.base["name"]
    config["inference_mode"] = True
    return {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in sorted(config.items())
    }


def read_metadata(folder: Path) -> dict[str, Any]:
    """`edgetune_adapter.json`, its hashes verified against the files beside it."""
    path = folder / METADATA
    try:
        metadata: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(
            f"{folder} is not an adapter that edgetune trained", expected=METADATA, got="no such file",
            fix="Name a run folder or its adapter folder.",
        ) from error  # fmt: skip
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON: {error}", fix="Train the adapter again.") from error
    if not isinstance(metadata, dict) or (missing := sorted({"base", "files", "task"} - set(metadata))):
        got = f"none for {', '.join(missing)}" if isinstance(metadata, dict) else type(metadata).__name__
        raise AdapterError(f"{path} is no adapter's description", expected="base, files, task …", got=got, fix="Train the adapter again.")
    for name, expected in metadata["files"].items():
        got = sha256_file(folder / name) if (folder / name).is_file() else "no such file"
        if got != expected:
            expected, got = f"sha256 {expected[:16]}…", got if got == "no such file" else f"{got[:16]}…"
            raise AdapterError(f"{folder / name} is damaged", expected=expected, got=got, fix="Copy it again from where it was trained.")
    return metadata


def load_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """Put the adapter in `folder` on a base model, for inference; every tensor that does not fit is listed."""
    config = LoraConfig.from_pretrained(str(folder))
    adapted = PeftModel(model, config)
    tensors = _without_copies({peft_name(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}, model, folder)
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    problems = mismatches(expected, tensors)
    if problems:
        raise AdapterError(f"{folder} does not fit the base model", got="; ".join(problems))
    set_peft_model_state_dict(adapted, tensors)
    return adapted.eval()


def peft_name(name: str) -> str:
    """A tensor's name as PEFT saves it: other tools leave the adapter's name (`.default`) in, or the prefix out."""
    name = re.sub(r"\.(lora_[AB]|lora_embedding_[AB])\.default(?=\.|$)", r".\1", name.replace(".modules_to_save.default", ""))
    return name if name.startswith(PREFIX) else f"{PREFIX}{name}"


def _without_copies(tensors: Mapping[str, Tensor], model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Without the copies of frozen weights that PEFT saves beside an adapter on an embedding or output projection.

    AdapterError where such a copy is not what the base has: it was trained, or the vocabulary was extended.
    """
    own = model.state_dict()
    kept = dict(tensors)
    for name in [name for name in kept if name.endswith(".base_layer.weight")]:
        theirs, ours = kept.pop(name), own.get(name.removeprefix(PREFIX))
        if ours is None or ours.shape != theirs.shape or not torch.allclose(ours.float(), theirs.float(), atol=1e-2, rtol=1e-2):
            got = "none here" if ours is None else f"shape {tuple(theirs.shape)}" if ours.shape != theirs.shape else "other values"
            raise AdapterError(f"{name} is not the base's own weight", where=str(folder), got=got, fix="Export it on the base it was trained on.")
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


def trainable_parameters(model: nn.Module) -> int:
    """Number of weights that learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
