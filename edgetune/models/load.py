"""A base → its model in torch and its tokenizer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from edgetune.core.errors import BaseModelError
from edgetune.core.head_layers import TRANSFORMERS, HeadLayers, head_layers
from edgetune.models.base import Base, weight_files
from edgetune.models.sentence_encoder import is_sentence_encoder
from edgetune.models.text_tokenizer import reads_text

if TYPE_CHECKING:
    import torch

    from edgetune.models.heads import SequenceClassifier

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


def checkpoint_head(base: Base, layers: HeadLayers | None) -> dict[str, torch.Tensor]:
    """What a base's files hold of a classifier's layers before the output: `pooler.dense.weight` →
    fp32 tensor. Not every base has any.
    """
    from safetensors import safe_open

    names = "|".join(map(re.escape, layers.inner if layers is not None else ()))
    wanted = re.compile(rf"(?:\w+\.)?((?:{names})\.(?:weight|bias))")
    found = {}
    for path in weight_files(base.folder) if names else ():
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                if match := wanted.fullmatch(key):
                    found[match[1]] = file.get_tensor(key).float()
    return found


def classifier_on(
    base: Base, body: Any, *, task: str, labels: int, head: str | None
) -> SequenceClassifier:
    """A base's body with a head (`build_classifier`), with what the base has of it."""
    from edgetune.models.heads import build_classifier

    layers = head_layers(body.config.to_dict(), task) if head == TRANSFORMERS else None
    own = checkpoint_head(base, layers)
    return build_classifier(
        body, task=task, labels=labels, pooling=base.pooling, head=head, own=own
    )


def new_head(base: Base, task: str) -> str | None:
    """The kind of head that a new adapter gets, as its metadata has it: on a sentence encoder one
    layer on the embedding (None), on any other encoder transformers' own.
    """
    if base.kind != "encoder" or is_sentence_encoder(base.folder):
        return None
    return TRANSFORMERS if head_layers(model_config(base).to_dict(), task) is not None else None


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
