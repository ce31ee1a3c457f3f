"""The recipe: what to train, from which base, on which data. One frozen dataclass tree, read from TOML.

Paths: data files are relative to the recipe file; `$VARIABLE` and `~` are expanded. `base` is taken
relative to the recipe file when such a folder or file exists there. `out` is relative to the current folder.
"""

# ruff: noqa: RUF009 - `option` is dataclasses.field
from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgetune import settings
from edgetune.errors import RecipeError
from edgetune.recipe_checks import check_parameters, check_trained
from edgetune.settings import option

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Method = Literal["sft", "sequence-classification", "causal-lm", "masked-lm"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Task = Literal["text-generation", "sequence-classification", "masked-lm"]
TASKS: dict[str, Task] = {
    "causal-lm": "text-generation",
    "masked-lm": "masked-lm",
    "sft": "text-generation",
    "sequence-classification": "sequence-classification",
}
KINDS: dict[str, Literal["decoder", "encoder"]] = {
    "causal-lm": "decoder",
    "masked-lm": "encoder",
    "sft": "decoder",
    "sequence-classification": "encoder",
}
COLUMNS = {
    "causal-lm": ("text",),
    "masked-lm": ("text",),
    "sft": ("prompt", "completion", "system", "template"),
    "sequence-classification": ("text", "label"),
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """The rows of a stage and how a row becomes an example.

    `prompt`, `completion`, `text` and `label` are each a column's name or a Jinja template over the row.
    """

    train: str = option(help="file of training rows (.jsonl .csv .tsv .parquet .txt, also .gz) or hub data set id")
    validation: str | None = option(None, help="file of validation rows, never trained on")
    prompt: str | None = option(None, help='sft: what the model is given, e.g. "{{ question }}"; default: column prompt')
    completion: str | None = option(None, help="sft: what it shall answer; default: column completion")
    text: str | None = option(None, help="causal-lm, masked-lm and classification: the text; default: column text")
    label: str | None = option(None, help="classification: its label; default: column label")
    system: str | None = option(
        None,
        help='sft with a chat template: the system message; not set: the template\'s default one; "": an explicit '
        "empty one (where the template has a default, this saves its tokens on the device)",
    )
    template: Literal["auto", "chat", "plain"] = option(
        "auto", help="sft: chat = the tokenizer's chat template; plain = prompt + completion; auto = chat if there is one"
    )
    skip_invalid: bool = option(False, help="leave out rows that cannot be used and count them, instead of stopping")
    limit: int | None = option(None, help="train on a random subset of this many rows, drawn with the seed", at_least=1)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A share of general text in every step of a stage, against forgetting: causal-lm on its own rows."""

    data: str = option(help="file of general text or hub data set id")
    share: float = option(0.1, help="weight of its loss, and its share of a step's tokens", above=0, below=1)
    text: str | None = option(None, help="the text: a column or a Jinja template; default: column text")


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """General ability before and after training, on the sets of a folder; results in summary.json and the report."""

    general: str = option(help="folder of the sets (WikiText-2, LAMBADA, PIQA, HellaSwag, ARC-E; STS-B for encoders)")
    tasks: tuple[str, ...] = option((), help="only these: wikitext2, lambada, piqa, hellaswag, arc_easy, stsb; []: all there are")
    limit: int | None = option(200, help="items of each at most, at equal distances", at_least=2)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pass of training with one objective; stages run in succession on the same weights."""

    method: Method = option(
        help="the objective", planned=("token-classification", "reward", "dpo", "grpo")
    )
    data: Data = option(help="the rows")
    replay: Replay | None = option(None, help="general text mixed into the stage; decoders only")
    epochs: float = option(1.0, help="passes over the training rows", above=0)
    max_steps: int | None = option(None, help="stop after this many optimizer steps", at_least=1)
    learning_rate: float = option(2e-4, help="peak learning rate", above=0)
    head_learning_rate: float | None = option(
        None, help="peak learning rate of the task head; not set: learning_rate", above=0
    )
    batch_size: int = option(
        8,
        help="examples per optimizer step, over all processes; what is too long for one pass is cut into parts whose "
        "gradients are added up",
        at_least=1,
    )
    max_length: int = option(
        512, help="tokens per example (causal-lm: per packed sequence), also limited by the base", at_least=8
    )
    warmup_ratio: float = option(0.05, help="share of the steps with rising learning rate", at_least=0, below=1)
    weight_decay: float = option(0.0, help="AdamW's decoupled weight decay", at_least=0)
    max_grad_norm: float = option(1.0, help="gradients are clipped to this 2-norm", above=0)
    precision: Literal["auto", "fp32", "bf16"] = option("auto", help="number format of the matrix products")
    validate_every: int | None = option(None, help="steps between validations; not set: once per epoch", at_least=1)
    label_smoothing: float = option(0.0, help="probability mass spread over all labels", at_least=0, below=1)
    head_init: Literal["probe", "random"] = option(
        "probe", help="probe = logistic regression on the frozen features first (LP-FT, Kumar et al. 2022); random"
    )

    @property
    def task(self) -> Task:
        """What an adapter trained by this stage does."""
        return TASKS[self.method]


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Which weights learn; everything but `train` is for lora."""

    train: Literal["lora", "head", "full"] = option(
        "lora",
        help="lora = an adapter; head = a new head alone, on features computed once; full = all weights, which become a "
        "base of their own",
    )
    rank: int = option(8, help="rank r of the adapter", at_least=1)
    alpha: float = option(16.0, help="the delta weight is alpha / r · B A", above=0)
    dropout: float = option(0.0, help="dropout before lora_A", at_least=0, below=1)
    target_modules: str | tuple[str, ...] = option(
        "all-linear", help='"all-linear", a list of module names, or one regular expression over module paths'
    )
    rslora: bool = option(False, help="scale by alpha / sqrt(r) (rsLoRA)")
    dora: bool = option(False, help="learn a magnitude per output too (DoRA)")
    rank_pattern: dict[str, int] = option(help="other ranks by module name or regex", factory=dict, at_least=1)
    alpha_pattern: dict[str, float] = option(help="other alphas by module name or regex", factory=dict, above=0)
    layers: tuple[int, ...] | None = option(None, help="[first, last]: only these layers, counted from 0; not set: all")
    init: str = option(
        "default",
        help="PEFT's init_lora_weights: default, gaussian, orthogonal, olora, pissa or pissa_niter_N (faster); olora and "
        "pissa are saved for the base as it ships, with twice the rank",
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run depends on."""

    base: str = option(help="builtin:NAME, a local folder, a .gguf file, folder#file.gguf or a hub id")
    out: str = option("runs/run", help="run folder")
    seed: int = option(0, help="the same seed gives the same adapter on the same machine", at_least=0)
    threads: int | None = option(None, help="CPU threads; not set: as many as torch chooses", at_least=1)
    device: Device = option(
        "auto", help="where training computes; auto = a CUDA GPU, else Apple's (MPS), else the CPU"
    )
    checkpoint_every: int | None = option(
        None,
        help="steps between checkpoints, for train --resume; not set: a tenth of a stage, at least 50. Also written "
        "between stages; gone when the run is finished",
        at_least=1,
    )
    keep_checkpoints: int = option(2, help="at most this many checkpoints are kept, the newest", at_least=1)
    parameters: Parameters = option(help="which weights learn", factory=Parameters)
    forgetting: Forgetting | None = option(None, help="measure general ability before and after")
    stage: tuple[Stage, ...] = option(help="at least one [[stage]]")

    @property
    def task(self) -> Task:
        """What the finished adapter does."""
        return self.stage[-1].task


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file; each override is `key.path=value`, e.g. `stage.0.epochs=2`."""
    if not path.exists():
        raise RecipeError("there is no such recipe file", where=str(path), fix="Give the path of a .toml file.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except IsADirectoryError:
        raise RecipeError("this is a folder", where=str(path), expected="a .toml file") from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise RecipeError("not UTF-8 text", where=str(path), got=f"byte {error.start} is invalid") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"not valid TOML: {error}", where=str(path)) from error
    for override in overrides:
        _apply(values, override)
    return recipe_from_dict(values, folder=path.parent, where=str(path))


def recipe_from_dict(values: Mapping[str, Any], *, folder: Path | None = None, where: str = "recipe") -> Recipe:
    """Build a recipe from plain values; relative data paths are taken from `folder` (default: the current one)."""
    folder = folder if folder is not None else Path()
    recipe = settings.from_dict(Recipe, values, where=where)
    if not recipe.stage:
        raise RecipeError("there is no stage", where=where, expected="at least one [[stage]]")
    check_parameters(recipe.parameters, where=where)
    for index, stage in enumerate(recipe.stage):
        check_trained(recipe.parameters, stage.method, path=f"stage.{index}", where=where)
        previous = recipe.stage[index - 1] if index else None
        _check_stage(stage, previous, path=f"stage.{index}", where=where)
    stages = tuple(
        replace(
            stage,
            data=_resolve_data(stage.data, folder=folder, path=f"stage.{index}.data", where=where),
            replay=_resolve_replay(stage, folder=folder, path=f"stage.{index}.replay", where=where),
        )
        for index, stage in enumerate(recipe.stage)
    )
    out = _expand(recipe.out, path="out", where=where)
    forgetting = recipe.forgetting
    if forgetting is not None:
        general = _absolute(folder, _expand(forgetting.general, path="forgetting.general", where=where))
        forgetting = replace(forgetting, general=general)
    base = _resolve_base(recipe.base, folder, where=where)
    return replace(recipe, base=base, out=out, forgetting=forgetting, stage=stages)


def to_toml(recipe: Recipe) -> str:
    """The recipe with every default written out; reading it again gives an equal recipe."""
    return settings.to_toml(recipe)


def _check_stage(stage: Stage, previous: Stage | None, *, path: str, where: str) -> None:
    if previous is not None and not _may_follow(stage, previous):
        raise RecipeError(
            f'{path}.method = "{stage.method}" cannot follow "{previous.method}"',
            where=where,
            expected="stages of one task, on encoders after masked-lm",
            fix="Split this into two recipes.",
        )
    used = COLUMNS[stage.method]
    for key in sorted({column for columns in COLUMNS.values() for column in columns} - set(used)):
        if getattr(stage.data, key) != getattr(Data, key):
            raise RecipeError(
                f"{path}.data.{key} has no meaning for {stage.method}",
                where=where,
                expected="of these, " + ", ".join(used),
                fix=f"Remove {key}.",
            )


def _may_follow(stage: Stage, previous: Stage) -> bool:
    """One adapter has one task; on an encoder, text may come first, for its head is not the adapter's."""
    return stage.task == previous.task or (previous.method == "masked-lm" and KINDS[stage.method] == "encoder")


def _resolve_data(data: Data, *, folder: Path, path: str, where: str) -> Data:
    """Absolute data paths; what looks like a hub id and is no file stays as it is."""

    def resolve(key: str, value: str) -> str:
        return _resolve_data_path(value, folder=folder, path=f"{path}.{key}", where=where)

    validation = None if data.validation is None else resolve("validation", data.validation)
    return replace(data, train=resolve("train", data.train), validation=validation)


def _resolve_replay(stage: Stage, *, folder: Path, path: str, where: str) -> Replay | None:
    if stage.replay is None:
        return None
    if KINDS[stage.method] != "decoder":
        fix = "Remove replay; masked-lm may come before this stage instead."
        raise RecipeError(f"{path} has no meaning for {stage.method}", where=where, expected="a method for decoders", fix=fix)
    return replace(stage.replay, data=_resolve_data_path(stage.replay.data, folder=folder, path=f"{path}.data", where=where))


def _resolve_data_path(value: str, *, folder: Path, path: str, where: str) -> str:
    from edgetune.data import is_hub_id

    if not value.strip():
        raise RecipeError(f"{path} is empty", where=where, expected="a data file or a hub data set id")
    resolved = _absolute(folder, _expand(value, path=path, where=where))
    return value if is_hub_id(value) and not Path(resolved).exists() else resolved


def _resolve_base(value: str, folder: Path, *, where: str) -> str:
    if not value.strip():
        raise RecipeError("base is empty", where=where, expected="builtin:NAME, a folder, a .gguf file or a hub id")
    if value.startswith("builtin:"):
        return value
    value = _expand(value, path="base", where=where)
    location = folder / value.partition("#")[0]
    return _absolute(folder, value) if location.exists() else value


def _absolute(folder: Path, value: str) -> str:
    return os.path.normpath(folder.absolute() / value)


def _expand(value: str, *, path: str, where: str) -> str:
    """`$NAME`, `${NAME}` and `~` replaced; an unset variable is an error, not an empty string."""

    def variable(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if name not in os.environ:
            raise RecipeError(
                f"{path} uses ${name}, which is not set",
                where=where,
                got=f'"{value}"',
                fix=f"Set it to a folder: export {name}=/path/to/data",
            )
        return os.environ[name]

    value = re.sub(r"\$(?:\{(\w+)\}|(\w+))", variable, value)
    try:
        return str(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError as error:
        raise RecipeError(f"{path}: {error}", where=where, got=f'"{value}"') from error


def _apply(values: dict[str, Any], override: str) -> None:
    """Put one `key.path=value` into the plain values; the value is TOML, or else a string."""
    key, equals, text = override.partition("=")
    where = f"--set {override}"
    if not equals or not key.strip():
        raise RecipeError("not a setting", where=where, expected="KEY=VALUE such as stage.0.epochs=2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    place: Any = values
    for part in parents:
        place = _step(place, part, where=where)
    if isinstance(place, list):
        raise RecipeError(f'"{last}" is not a setting', where=where, expected="a key inside it, e.g. stage.0.epochs")
    if not isinstance(place, dict):
        raise RecipeError(f'"{parents[-1]}" has no settings inside', where=where)
    place[last] = value


def _step(place: Any, part: str, *, where: str) -> Any:
    if isinstance(place, list):
        if not part.isdecimal() or int(part) >= len(place):
            raise RecipeError(f'no stage "{part}"', where=where, expected=f"a number from 0 to {len(place) - 1}")
        return place[int(part)]
    if not isinstance(place, dict):
        raise RecipeError(f'"{part}" has no settings inside', where=where)
    return place.setdefault(part, {})
