"""A base → its model in torch and its tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from edgetune.core.errors import BaseModelError
from edgetune.models.base import Base
from edgetune.models.text_tokenizer import reads_text

if TYPE_CHECKING:
    import torch

# kind of base → the task whose model is loaded
TASK_OF_KIND = {
    "decoder": "text-generation",
    "encoder": "feature-extraction",
    "encoder-decoder": "text2text-generation",
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no reports from transformers inside."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def auto_class(task: str) -> Any:
    """transformers' Auto class of a task, by optimum's name of it: text-generation, fill-mask …"""
    from optimum.exporters.tasks import TasksManager

    return TasksManager.get_model_class_for_task(task)


def load_for(base: Base, task: str, *, dtype: torch.dtype | None = None) -> tuple[Any, set[str]]:
    """The transformers model of a task (float32 by default), and the names of its tensors that are
    not in the base's files; an encoder's unused pooler is not among them.
    """
    import torch

    with quiet():
        try:
            model, report = auto_class(task).from_pretrained(
                base.folder,
                dtype=dtype or torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BaseModelError(
                f"the model cannot be loaded: {line}", where=str(base.folder)
            ) from error
    return model, {name for name in report["missing_keys"] if "pooler" not in name}


def refuse_missing(missing: Collection[str], base: Base) -> None:
    """BaseModelError where there are any."""
    if missing:
        raise BaseModelError(
            f"{len(missing)} tensors of the model are not in its files",
            where=str(base.folder),
            got="without " + ", ".join(sorted(missing)[:3]),
            fix="The configuration does not fit the weights; copy the folder again.",
        )


def load_body(base: Base, *, dtype: torch.dtype | None = None) -> Any:
    """The transformers model in evaluation mode (float32 by default): a decoder or encoder-decoder
    with its output projection, or an encoder without head; with the weights of the bundle where the
    base has a `precision`. Weights that are missing in the file raise, but for an encoder's unused
    pooler."""
    model, missing = load_for(base, TASK_OF_KIND[base.kind], dtype=dtype)
    refuse_missing(missing, base)
    if base.precision is not None:
        from edgetune.models.fake_quantise import round_weights

        round_weights(model, base.precision)
    return model.eval()


def hidden_size(base: Base) -> int:
    """The width of the model's layers, by its configuration alone."""
    return int(model_config(base).hidden_size)


def model_config(base: Base) -> Any:
    """transformers' configuration of the model."""
    from transformers import AutoConfig

    with quiet():
        try:
            return AutoConfig.from_pretrained(base.folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BaseModelError(
                f"the model cannot be loaded: {line}", where=str(base.folder)
            ) from error


def load_tokenizer(base: Base) -> Any:
    """The tokenizer that training reads with and that ships (a PreTrainedTokenizerFast); in a plain
    `str` control tokens are characters (`text_tokenizer`).
    """
    return reads_text(plain_tokenizer(base))


def plain_tokenizer(base: Base) -> Any:
    """The tokenizer as transformers makes it of all files of the folder, and nothing of ours."""
    from transformers import AutoTokenizer

    with quiet():
        try:
            return AutoTokenizer.from_pretrained(base.folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise BaseModelError(
                f"the tokenizer cannot be loaded: {error}", where=str(base.folder)
            ) from error
