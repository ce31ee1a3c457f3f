"""What `edgetune eval` measures likelihoods and embeddings on: a bundle, a run in torch, or a bare
base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.adapters.full_model import full_folder, read_full
from edgetune.adapters.lora import adapter_off
from edgetune.adapters.runs import find_adapter, load_adapted_model
from edgetune.core.errors import InputError
from edgetune.core.layout import BUILTIN, MANIFEST, MODEL, MODEL_CONFIG, MODEL_METADATA
from edgetune.core.progress import Say
from edgetune.evaluation.forgetting.likelihood import ChoiceItem, Score
from edgetune.evaluation.forgetting.measure import General, compare_general
from edgetune.evaluation.forgetting.tasks import Texts
from edgetune.evaluation.forgetting.torch_subject import TorchSubject
from edgetune.models.base import Base, open_folder
from edgetune.models.heads import unwrapped
from edgetune.models.load import load_body, load_tokenizer
from edgetune.models.resolve import resolve_base

ROWS_AT_ONCE = 8


def is_base(target: Path) -> bool:
    """Whether `eval`'s argument names a base model: built in, a GGUF file, or a folder with a model
    and nothing of a run.
    """
    name = str(target)
    if name.startswith(BUILTIN) or name.endswith(".gguf") or "#" in name:
        return True
    return (
        (target / MODEL_CONFIG).is_file()
        and not (target / MANIFEST).is_file()
        and full_folder(target) is None
    )


def forgetting(
    target: Path,
    general: Path,
    *,
    adapter: str | None = None,
    limit: int | None = None,
    tasks: Sequence[str] = (),
    providers: Sequence[str] = (),
    engine: str = "auto",
    say: Say = lambda line: None,
) -> list[General]:
    """General ability of a run or bundle before and after, or of a bare base. `providers`:
    execution providers of a bundle.
    """
    if (target / MANIFEST).is_file():
        from edgetune.runtime import Runtime

        with Runtime.open(target, providers=providers, engine=engine) as runtime:
            if runtime.manifest.mode == "merged":
                raise InputError(
                    "a merged bundle has no base to compare with",
                    where=str(target),
                    fix="Measure the run instead.",
                )
            return compare_general(
                BundleSubject(runtime, adapter), general, limit=limit, tasks=tasks, say=say
            )
    if providers:
        raise InputError(
            "--provider chooses what runs a bundle",
            where=str(target),
            got="a run or a base, which torch runs",
        )
    if is_base(target):
        base = resolve_base(str(target))
        return compare_general(
            base_subject(base), general, limit=limit, tasks=tasks, trained=False, say=say
        )
    return compare_general(run_subject(target), general, limit=limit, tasks=tasks, say=say)


def base_subject(base: Base) -> TorchSubject:
    """A bare base."""
    model, tokenizer = load_body(base), load_tokenizer(base)

    def lend() -> Any:
        return contextlib.nullcontext(model)

    return _torch_subject(tokenizer, base, lend, lend)


def run_subject(folder: Path) -> TorchSubject:
    """A run: with its adapter off and on, or, where all weights learned, the base it came from and
    its own model.
    """
    model, tokenizer, metadata = load_adapted_model(folder)
    if metadata["task"] == "reward":
        raise InputError(
            "a reward predicts no text that could be forgotten",
            where=str(folder),
            expected="a run of another method",
        )

    def after() -> Any:
        return contextlib.nullcontext(model)

    origin = full_folder(folder) or (None if full_folder(folder) else _model_beside(folder))
    if origin is None:
        base = resolve_base(metadata["base"]["name"])
        return _torch_subject(tokenizer, base, lambda: adapter_off(model), after)
    base, before = _original(origin)
    return _torch_subject(tokenizer, base, lambda: contextlib.nullcontext(before), after)


def _model_beside(folder: Path) -> Path | None:
    model = find_adapter(folder).parent / MODEL
    return model if (model / MODEL_METADATA).is_file() else None


def _original(model: Path) -> tuple[Base, Any]:
    own, metadata = read_full(model)
    base = resolve_base(metadata["base"]["name"])
    if base.digest != metadata["base"]["digest"]:
        raise InputError(
            "the base that this model was trained from has changed",
            where=str(model),
            expected=metadata["base"]["digest"],
            got=base.digest,
        )
    return open_folder(own.folder, name=own.name, digest=own.digest), load_body(base)


def _torch_subject(tokenizer: Any, base: Base, before: Any, after: Any) -> TorchSubject:
    if base.kind == "encoder-decoder":
        raise _goes_on_with_nothing(base.name)
    return TorchSubject(
        tokenizer,
        kind=base.kind,
        limit=base.max_length,
        pooling=base.pooling,
        before=before,
        after=after,
    )


def _goes_on_with_nothing(where: str) -> InputError:
    return InputError(
        "an encoder-decoder does not go on with a text, so what it forgot of texts is not measured",
        where=where,
        expected="a decoder or an encoder",
    )


def torch_texts(model: Any, tokenizer: Any) -> TorchSubject:
    """A model in memory, as it is, for scoring texts."""
    limit = getattr(unwrapped(model).config, "max_position_embeddings", None) or 1 << 20
    return TorchSubject(
        tokenizer,
        kind="decoder",
        limit=limit,
        pooling=None,
        before=lambda: contextlib.nullcontext(model),
        after=lambda: contextlib.nullcontext(model),
    )


class BundleSubject:
    """A bundle with one of its adapters off or on; of a base alone the base. See
    `edgetune.evaluation.forgetting.measure.Subject`.
    """

    def __init__(self, runtime: Any, adapter: str | None) -> None:
        names = tuple(runtime.adapters)
        if adapter is None and len(names) > 1:
            raise InputError(
                "which adapter?",
                where=str(runtime.folder),
                expected=f"--adapter with one of {', '.join(names)}",
            )
        self._runtime, self._adapter = (
            runtime,
            adapter if adapter is not None else next(iter(names), None),
        )
        if (
            self._adapter is not None and runtime.task(self._adapter) == "reward"
        ):  # an unknown name is an error before anything runs, too
            raise InputError(
                "a reward predicts no text that could be forgotten",
                where=self._adapter,
                expected="an adapter of another method",
            )
        self.texts: Texts | None = None
        if runtime.manifest.graph.encoder is not None:
            raise _goes_on_with_nothing(str(runtime.folder))
        if runtime.manifest.is_decoder:
            self.texts = Texts(self._encode, self._beginning(), runtime.manifest.graph.max_length)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._runtime.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _beginning(self) -> list[int]:
        tokenizer = self._runtime.tokenizer
        bos = tokenizer.special_tokens.get("bos_token")
        first = tokenizer.encode("a")[:1]
        return first if bos is not None and first == [tokenizer.tokenizer.token_to_id(bos)] else []

    def score(self, items: Sequence[ChoiceItem], *, adapted: bool) -> list[list[Score]]:
        """A score for every choice of every item; the engine runs each choice with its context."""
        pairs = [
            (n, item.context, choice) for n, item in enumerate(items) for choice in item.choices
        ]
        found: list[list[tuple[int, Score]]] = [[] for _ in items]
        name = self._adapter if adapted or self._runtime.manifest.mode == "merged" else None
        for part in _by_length([len(context) + len(choice) for _, context, choice in pairs]):
            for place, one in zip(
                part, self._scored([pairs[at][1:] for at in part], name), strict=True
            ):
                found[pairs[place][0]].append((place, one))
        return [[one for _, one in sorted(scores, key=lambda entry: entry[0])] for scores in found]

    def _scored(
        self, pairs: Sequence[tuple[list[int], list[int]]], name: str | None
    ) -> Iterator[Score]:
        rows = [context + choice[:-1] for context, choice in pairs]
        positions = [
            list(range(len(context) - 1, len(context) + len(choice) - 1))
            for context, choice in pairs
        ]
        logits = self._runtime.decoder.logits(
            rows, [self._runtime.bound(name)] * len(rows), positions=positions
        )
        for (_, choice), row in zip(pairs, logits, strict=True):
            row = row.astype(np.float64)
            highest = row.max(-1, keepdims=True)
            normed = row - highest - np.log(np.exp(row - highest).sum(-1, keepdims=True))
            yield Score(
                float(normed[np.arange(len(choice)), choice].sum()),
                bool((row.argmax(-1) == choice).all()),
            )

    def embed(self, texts: Sequence[str], *, adapted: bool) -> Any:
        """Pooled states (texts, hidden)."""
        return self._runtime.embed(
            list(texts), self._adapter if adapted else None, normalize=False, truncate=True
        )


def _by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda at: lengths[at])
    for start in range(0, len(order), ROWS_AT_ONCE):
        yield order[start : start + ROWS_AT_ONCE]
