"""LoRA on a torch model: added, found, switched off; which layers it targets."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from edgetune.adapters.folder import PEFT_TASKS
from edgetune.core.errors import RecipeError
from edgetune.models.heads import HEADS, UNUSED, SequenceClassifier, TokenClassifier, head_of
from edgetune.recipe.checks import changes_the_base
from edgetune.recipe.schema import Parameters

ALL_LINEAR = "all-linear"


def adapt(model: nn.Module, parameters: Parameters, *, task: str) -> PeftModel:
    """Put a fresh adapter on `model`: base frozen, adapter (and head) trainable, ΔW = 0 at the
    start (before `loftq`).
    """
    names = within(target_names(model, parameters.target_modules), parameters.layers)
    for table, pattern in (
        ("rank_pattern", parameters.rank_pattern),
        ("alpha_pattern", parameters.alpha_pattern),
    ):
        _check_pattern(pattern, names, table=table)
    head = head_of(model)
    config = LoraConfig(
        task_type=(
            "SEQ_2_SEQ_LM"
            if getattr(model.config, "is_encoder_decoder", False)
            else PEFT_TASKS[task]
        ),  # type: ignore[union-attr]
        r=parameters.r,
        lora_alpha=_whole(parameters.lora_alpha),
        lora_dropout=parameters.dropout,
        target_modules=names,
        use_rslora=parameters.rslora,
        use_dora=parameters.dora,
        rank_pattern=dict(parameters.rank_pattern),
        alpha_pattern={name: _whole(alpha) for name, alpha in parameters.alpha_pattern.items()},
        modules_to_save=list(head) or None,
        init_lora_weights=True if parameters.init in ("default", "loftq") else parameters.init,
        fan_in_fan_out=all(
            type(model.get_submodule(name)).__name__ == "Conv1D" for name in names
        ),  # GPT-2's weights lie (in, out)
    )
    if parameters.init == "orthogonal" and (odd := _odd_ranks(parameters)):
        raise RecipeError(
            'init = "orthogonal" needs an even rank', where="parameters.init", got=f"rank {odd}"
        )
    _check_ranks(model, names, parameters)
    return PeftModel(model, config)


def adapt_head(model: SequenceClassifier) -> PeftModel:
    """`model` with its head trainable and everything else frozen, in the form of an adapter without
    low-rank weights.

    "dummy-target-modules" is PEFT's own word for a LoRA configuration that targets nothing
    (`peft.utils.constants.DUMMY_TARGET_MODULES`), so the saved folder loads in PEFT unchanged.
    """
    task = "TOKEN_CLS" if isinstance(model, TokenClassifier) else "SEQ_CLS"
    config = LoraConfig(
        task_type=task,
        r=1,
        lora_alpha=1,
        target_modules=DUMMY_TARGET_MODULES,
        modules_to_save=list(model.head_modules),
    )
    return PeftModel(model, config)


def within(names: list[str], layers: tuple[int, ...] | None) -> list[str]:
    """The modules of layers first … last; a module's layer is the first number in its name."""
    if layers is None:
        return names
    numbers = {
        name: next((int(part) for part in name.split(".") if part.isdecimal()), None)
        for name in names
    }
    last = max((number for number in numbers.values() if number is not None), default=-1)
    if layers[1] > last:
        raise RecipeError(
            "the range goes beyond the last layer",
            where="parameters.layers",
            expected=f"at most {last}",
            got=str(layers[1]),
        )
    return [
        name
        for name, number in numbers.items()
        if number is not None and layers[0] <= number <= layers[1]
    ]


def _odd_ranks(parameters: Parameters) -> int | None:
    return next(
        (rank for rank in (parameters.r, *parameters.rank_pattern.values()) if rank % 2), None
    )


def _check_ranks(model: nn.Module, names: list[str], parameters: Parameters) -> None:
    """No rank is larger than every weight; and PiSSA, OLoRA and LoftQ have no more directions than
    each has rows or columns.
    """
    largest = max(parameters.r, *parameters.rank_pattern.values(), 1)
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in names}
    widest = max(max(weight.shape) for weight in weights.values())
    if largest > widest:
        raise RecipeError(
            "a rank above every weight's rows and columns adds nothing",
            where="parameters.rank",
            expected=f"at most {widest} for this base",
            got=str(largest),
        )
    if not changes_the_base(parameters.init) and parameters.init != "loftq":
        return
    for name, weight in weights.items():
        if largest > min(weight.shape):
            raise RecipeError(
                f'init = "{parameters.init}" needs a rank of at most the smaller side of each'
                " weight",
                where="parameters.rank",
                expected=f"at most {min(weight.shape)} for {name}",
                got=str(largest),
            )


def target_names(model: nn.Module, target_modules: str | tuple[str, ...]) -> list[str]:
    """The full names of the linear modules that get an adapter.

    `target_modules` is "all-linear", a regular expression over full names (a string), or a list of
    names, each of which matches a module of that name or whose name ends in `.name`; as in PEFT.
    """
    linears = dict(_linears(model))
    if target_modules == ALL_LINEAR:
        return list(linears)
    if isinstance(target_modules, str):
        pattern = _pattern(target_modules, where="parameters.target_modules")
        found = [name for name in linears if pattern.fullmatch(name)]
        unmatched = [] if found else [target_modules]
    else:
        found = [
            name for name in linears if any(_ends_in(name, wanted) for wanted in target_modules)
        ]
        unmatched = [
            wanted
            for wanted in target_modules
            if not any(_ends_in(name, wanted) for name in linears)
        ]
    if unmatched or not found:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise RecipeError(
            f"target_modules {', '.join(map(repr, unmatched)) or '[]'} matches no linear layer of"
            " this base",
            where="parameters.target_modules",
            fix=f'There are: {", ".join(kinds)}; or "{ALL_LINEAR}" for all.',
        )
    return found


def _check_pattern(pattern: Mapping[str, float], names: list[str], *, table: str) -> None:
    """PEFT passes over a pattern that matches nothing; here that is an error."""
    for key in pattern:
        _pattern(key, where=f"parameters.{table}")
        if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):
            raise RecipeError(
                f"{key!r} matches no target module",
                where=f"parameters.{table}",
                expected=", ".join(sorted({name.rpartition(".")[2] for name in names})),
                got=key,
            )


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
        if (
            linear
            and module is not output
            and name.startswith(in_body)
            and not set(name.split(".")) & {*HEADS, *UNUSED}
        ):
            yield name, module


def _ends_in(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _whole(number: float) -> float | int:
    """16.0 → 16: PEFT's own type for alpha is int, and other readers of its file expect that."""
    return int(number) if float(number).is_integer() else number


def trainable_parameters(model: nn.Module) -> int:
    """Number of weights that learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[Any]:
    """The base model's own answers (a PEFT model's `disable_adapter`), in evaluation mode."""
    with model.disable_adapter():
        model.eval()
        yield model


@contextlib.contextmanager
def only_adapter(model: Any, name: str) -> Iterator[None]:
    """The model with this adapter alone, also inside `disable_adapter`; nothing about gradients
    changes.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    training = model.training
    model.eval()
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [name], False
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled
        model.train(training)
