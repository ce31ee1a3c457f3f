"""What a sentence-transformers folder says beyond the model: `modules.json` and the files it names.

Read: the pooling, the longest text, Normalize (embeddings are normalised here anyway). Whatever
else would change an embedding is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgetune.core.errors import BaseModelError
from edgetune.core.layout import MODEL_CONFIG, TOKENIZER
from edgetune.models.model_files import read_object

Pooling = Literal["mean", "cls"]
MODULES, SENTENCES, PROMPTS = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
POOLING = "1_Pooling"
HARMLESS = ("Normalize", "Dropout")  # modules that change no normalised embedding
POOLINGS: dict[str, Pooling] = {
    "mean": "mean",
    "mean_tokens": "mean",
    "cls": "cls",
    "cls_token": "cls",
}


@dataclass(frozen=True)
class SentenceEncoder:
    """How an encoder's states become an embedding; `max_length`: tokens, None where it is not
    said.
    """

    pooling: Pooling
    max_length: int | None = None


def read_sentence_encoder(folder: Path) -> SentenceEncoder:
    """A sentence encoder's own pooling and limit; other encoders are read at their first token.

    BaseModelError names the module, or the setting, that an exported embedding would lack.
    """
    if not (folder / MODULES).exists():
        path = folder / POOLING / MODEL_CONFIG
        return SentenceEncoder(_pooling(path) if path.exists() else "cls")
    pooling: Pooling | None = None
    for kind, inside in _modules(folder / MODULES):
        if kind == "Transformer" and inside in ("", "."):
            continue
        if kind == "Pooling" and pooling is None:
            pooling = _pooling(folder / inside / MODEL_CONFIG)
        elif kind not in HARMLESS:
            raise _refusal(
                folder / MODULES,
                f"its module {kind} is not supported",
                inside or "the folder itself",
            )
    if pooling is None:
        raise _refusal(folder / MODULES, "it has no Pooling module", "no embedding of a text")
    return SentenceEncoder(pooling, _settings(folder))


def is_sentence_encoder(folder: Path) -> bool:
    """Whether the folder says how its states become an embedding."""
    return (folder / MODULES).exists() or (folder / POOLING / MODEL_CONFIG).exists()


def sentence_files(folder: Path) -> list[str]:
    """The files that `read_sentence_encoder` reads: a copy of the folder needs them."""
    named = _modules(folder / MODULES) if (folder / MODULES).exists() else [("", POOLING)]
    configs = [f"{path}/{MODEL_CONFIG}" for _, path in named if path]
    return [MODULES, SENTENCES, PROMPTS, *configs]


def _modules(path: Path) -> list[tuple[str, str]]:
    """(class, folder) of every module, in their order."""
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        return [(str(m["type"]).rpartition(".")[2], str(m.get("path", ""))) for m in modules]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BaseModelError(f"not a list of modules: {error!r:.120}", where=str(path)) from error


def _pooling(path: Path) -> Pooling:
    values = read_object(path)
    mode = values.get("pooling_mode")  # newer files name it, older ones have one flag a mode
    named = [mode] if isinstance(mode, str) else list(mode or ())
    flags = [
        key.removeprefix("pooling_mode_")
        for key, value in values.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    modes = sorted({POOLINGS.get(name, name) for name in (*named, *flags)})
    if len(modes) == 1 and modes[0] in POOLINGS:
        return POOLINGS[modes[0]]
    raise BaseModelError(
        "this pooling is not supported",
        where=str(path),
        expected="mean or cls",
        got=" and ".join(modes) or "none",
    )


def _settings(folder: Path) -> int | None:
    """The longest text in tokens; other settings that change what is embedded are refused."""
    prompts = read_object(folder / PROMPTS) if (folder / PROMPTS).exists() else {}
    name = prompts.get("default_prompt_name")
    if name is not None and (prompts.get("prompts") or {}).get(name):
        raise _refusal(
            folder / PROMPTS,
            "it puts a prompt before every text",
            f"default_prompt_name {name!r}: {prompts['prompts'][name]!r:.60}",
            fix="Set default_prompt_name to null there, and write the prompt into the texts.",
        )
    settings = read_object(folder / SENTENCES) if (folder / SENTENCES).exists() else {}
    if settings.get("do_lower_case") and not _lowers(folder):
        raise _refusal(
            folder / SENTENCES,
            "it lower-cases texts before its tokenizer",
            "do_lower_case true",
            fix="Save a tokenizer.json that lower-cases, and set do_lower_case to false.",
        )
    longest = settings.get("max_seq_length")
    return int(longest) if isinstance(longest, int) and longest > 0 else None


def _lowers(folder: Path) -> bool:
    """Whether the tokenizer lower-cases by itself."""
    normalizer: Mapping[str, Any] = read_object(folder / TOKENIZER).get("normalizer") or {}
    parts = [normalizer, *(normalizer.get("normalizers") or ())]
    return any(part.get("lowercase") or part.get("type") == "Lowercase" for part in parts)


def _refusal(where: Path, what: str, got: str, *, fix: str | None = None) -> BaseModelError:
    return BaseModelError(
        f"this sentence encoder computes more than a bundle does: {what}",
        where=str(where),
        expected="Transformer, Pooling (mean or cls), Normalize",
        got=got,
        fix=fix or f"Without {MODULES} it is taken as a plain encoder: its embeddings are others.",
    )
