"""What `edgetune eval` measures likelihoods and embeddings on: a bundle (here, without torch), a
run or a bare base (`torch_subject`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.core.errors import InputError
from edgetune.core.layout import BUILTIN, MANIFEST, MODEL_CONFIG
from edgetune.core.progress import Say
from edgetune.core.settings import some_of
from edgetune.evaluation.forgetting.likelihood import ChoiceItem, Score, goes_on_with_nothing
from edgetune.evaluation.forgetting.measure import General, compare_general
from edgetune.evaluation.forgetting.tasks import Texts

ROWS_AT_ONCE = 8


def is_base(target: Path) -> bool:
    """Whether `eval`'s argument names a base model: built in, a GGUF file, or a folder with a model
    and nothing of a run.
    """
    from edgetune.adapters.full_model import full_folder

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
    from edgetune.evaluation.forgetting.torch_subject import base_subject, run_subject
    from edgetune.models.resolve import resolve_base

    if is_base(target):
        base = resolve_base(str(target))
        return compare_general(
            base_subject(base), general, limit=limit, tasks=tasks, trained=False, say=say
        )
    return compare_general(run_subject(target), general, limit=limit, tasks=tasks, say=say)


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
                expected=f"--adapter with {some_of(names)}",
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
            raise goes_on_with_nothing(str(runtime.folder))
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
