"""`parameters.start`: an adapter that goes on learning, instead of a fresh one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from edgetune.adapters.folder import mismatches, read_config, read_metadata, read_tensors
from edgetune.adapters.runs import find_adapter
from edgetune.core.errors import AdapterError, RecipeError
from edgetune.core.files import sha256_file
from edgetune.core.layout import ADAPTER_WEIGHTS
from edgetune.models.base import Base
from edgetune.recipe.schema import Recipe

# What of PEFT's configuration the weights' shapes do not show, and the recipe's word for it.
SCALES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}


@dataclass(frozen=True)
class StartAdapter:
    """A finished adapter of the recipe's base and task."""

    folder: Path
    labels: tuple[str, ...] | None
    digest: str  # of its weights
    # how the base's weights were rounded while it learned; None: not at all
    rounded: Mapping[str, Any] | None = None
    head: str | None = None  # its kind, as its metadata has it

    def other_weights(self, rounded: Mapping[str, Any] | None) -> str:
        """A line for a person where the base is `rounded` otherwise now than while it learned;
        empty where it is not.
        """
        if self.rounded == rounded:
            return ""
        return (
            f"start: {self.folder} learned on {_words(self.rounded)} weights of the base, and goes"
            f" on on {_words(rounded)} ones"
        )

    def put_on(self, model: PeftModel) -> None:
        """Give the fresh adapter of `model` these weights. AdapterError where the recipe describes
        another adapter.
        """
        self._check_settings(model.peft_config["default"])
        tensors = read_tensors(self.folder)
        if problems := mismatches(
            get_peft_model_state_dict(model, save_embedding_layers=False), tensors
        ):
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise AdapterError(
                "parameters.start is an adapter of other modules or shapes than [parameters] says",
                where=str(self.folder),
                got="; ".join(problems[:3]) + more,
                fix="Set target_modules, layers and rank as in its recipe.toml.",
            )
        set_peft_model_state_dict(model, tensors)

    def _check_settings(self, wanted: Any) -> None:
        found = read_config(self.folder)
        differing = [name for name in SCALES if getattr(wanted, name) != getattr(found, name)]
        if differing:
            raise AdapterError(
                "parameters.start was trained with other settings than [parameters] says",
                where=str(self.folder),
                expected=", ".join(
                    f"{SCALES[name]} = {getattr(found, name)}" for name in differing
                ),
                got=", ".join(str(getattr(wanted, name)) for name in differing),
                fix="Copy them from its recipe.toml.",
            )


def read_start(recipe: Recipe, base: Base) -> StartAdapter | None:
    """The adapter that `parameters.start` names; None where the recipe starts afresh.

    Raises AdapterError for no adapter, a damaged one, or one of another base; RecipeError for one
    of another task.
    """
    if recipe.parameters.start is None:
        return None
    folder = find_adapter(Path(recipe.parameters.start))
    metadata = read_metadata(folder)
    if metadata["base"]["digest"] != base.digest:
        raise AdapterError(
            "parameters.start was trained on another base",
            where=str(folder),
            expected=f"{base.name} {base.digest[:23]}…",
            got=f"{metadata['base']['name']} {metadata['base']['digest'][:23]}…",
            fix="Set base as in its recipe.toml.",
        )
    if metadata["task"] != recipe.task:
        raise RecipeError(
            "parameters.start is an adapter of another task",
            where=str(folder),
            expected=recipe.task,
            got=metadata["task"],
        )
    problem = recipe.stage[-1].problem
    if (trained := metadata.get("problem") or problem) != problem:
        raise RecipeError(
            "parameters.start was trained for another problem",
            where=str(folder),
            expected=problem,
            got=trained,
        )
    labels: Sequence[str] | None = metadata.get("labels")
    return StartAdapter(
        folder,
        None if labels is None else tuple(labels),
        "sha256:" + sha256_file(folder / ADAPTER_WEIGHTS),
        metadata.get("base_precision"),
        metadata.get("head"),
    )


def _words(rounded: Mapping[str, Any] | None) -> str:
    """`int4 (blocks of 32, lm_head int8)`."""
    if rounded is None:
        return "unrounded"
    kept = [
        f"{module} {precision}" for module, precision in (rounded.get("overrides") or {}).items()
    ]
    how = [f"rounded by {rounded['quantiser']}"] if rounded.get("quantiser", "rtn") != "rtn" else []
    revision = [f"rounding {rounded['rounding']}"] if "rounding" in rounded else []
    parts = ", ".join([f"blocks of {rounded.get('block_size')}", *how, *kept, *revision])
    return f"{rounded.get('weights')} ({parts})"
