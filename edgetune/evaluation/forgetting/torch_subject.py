"""A model in torch as a subject: `before` and `after` lend it without and with what it learned.

The choices of an item share its context.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.adapters.full_model import full_folder, read_full
from edgetune.adapters.lora import adapter_off
from edgetune.adapters.runs import find_adapter, load_adapted_model
from edgetune.core.errors import InputError
from edgetune.core.layout import MODEL, MODEL_METADATA
from edgetune.core.tasks import Kind
from edgetune.data.batching import in_order_of_length
from edgetune.evaluation.forgetting.likelihood import ChoiceItem, Score, goes_on_with_nothing
from edgetune.evaluation.forgetting.tasks import Texts
from edgetune.models.base import Base, open_folder
from edgetune.models.heads import Embedder, SequenceClassifier, pool, unwrapped
from edgetune.models.load import load_body, load_tokenizer
from edgetune.models.resolve import resolve_base
from edgetune.models.sentence_encoder import Pooling
from edgetune.models.torch_device import Precision, autocast, device_of, to_device
from edgetune.objectives.language import projection_only_at

Lend = Callable[[], contextlib.AbstractContextManager[Any]]


class TorchSubject:
    """See `edgetune.evaluation.forgetting.measure.Subject`."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        kind: Kind,
        limit: int,
        pooling: Pooling | None,
        before: Lend,
        after: Lend,
        precision: Precision = "fp32",
    ) -> None:
        self._lend = {False: before, True: after}
        self._tokenizer, self._limit, self._pooling, self._precision = (
            tokenizer,
            limit,
            pooling,
            precision,
        )
        self.texts = Texts(self._encode, beginning(tokenizer), limit) if kind == "decoder" else None

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def score(self, items: Sequence[ChoiceItem], *, adapted: bool) -> list[list[Score]]:
        """A score for every choice of every item."""
        with self._lend[adapted]() as model:
            return score_items(model, items, precision=self._precision)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], *, adapted: bool) -> Any:
        """Pooled states (texts, hidden) as a float32 array; longer texts are cut to the model's
        positions.
        """
        ids = self._tokenizer(list(texts), truncation=True, max_length=self._limit, verbose=False)[
            "input_ids"
        ]
        lengths, rows = [len(row) for row in ids], list[tuple[int, torch.Tensor]]()
        with self._lend[adapted]() as model, autocast(self._precision, device_of(model)):
            for part in in_order_of_length(
                lengths, 4 * TOKENS_AT_ONCE, batch_size=SEQUENCES_AT_ONCE
            ):
                batch = self._tokenizer.pad(
                    {"input_ids": [ids[index] for index in part]}, return_tensors="pt"
                )
                inputs = to_device((batch["input_ids"], batch["attention_mask"]), device_of(model))
                rows += zip(part, self._pooled(model, *inputs).float().cpu(), strict=True)
        return torch.stack([row for _, row in sorted(rows, key=lambda pair: pair[0])]).numpy()

    def _pooled(self, model: Any, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        inner = unwrapped(model)
        if isinstance(inner, (Embedder, SequenceClassifier)):
            return inner.pooled(input_ids, mask)
        body = inner.base_model  # of a masked-lm model; a bare body is its own
        hidden = body(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return pool(hidden, mask, self._pooling or "mean")


def beginning(tokenizer: Any) -> list[int]:
    """The ids a tokenizer puts before every text: bos, or nothing."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a", verbose=False)["input_ids"]
    return [bos] if bos is not None and ids[:1] == [bos] else []


TOKENS_AT_ONCE, SEQUENCES_AT_ONCE = 1024, 32


@torch.no_grad()
def score_items(
    model: Any, items: Sequence[ChoiceItem], *, precision: Precision = "fp32"
) -> list[list[Score]]:
    """A score for every choice of every item, in their order."""
    model.eval()
    scores: list[list[Score]] = [[] for _ in items]
    lengths = [item.tokens for item in items]
    for part in in_order_of_length(lengths, TOKENS_AT_ONCE, batch_size=SEQUENCES_AT_ONCE):
        found = _score_batch(model, [items[index] for index in part], precision=precision)
        for index, row in zip(part, found, strict=True):
            scores[index] = row
    return scores


def _score_batch(
    model: Any, items: Sequence[ChoiceItem], *, precision: Precision
) -> list[list[Score]]:
    input_ids, position_ids, mask = _tree(items)
    places, targets = zip(*(_predicted(item) for item in items), strict=True)
    wanted = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, place in enumerate(places):
        wanted[row, place] = True
    device = device_of(model)
    inputs = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": _as_taken(mask, model),
    }
    with autocast(precision, device), projection_only_at(model, wanted.to(device)):
        logits = model(**to_device(inputs, device), use_cache=False).logits
    logits = logits.reshape(-1, logits.shape[-1]).float()  # (wanted positions, vocab)
    # Where a position stands among the wanted ones; a context's last position predicts the first
    # token of all choices.
    index = wanted.flatten().cumsum(0).view_as(wanted) - 1
    scores = []
    for row, item in enumerate(items):
        at = logits[index[row, places[row]].to(device)]
        target = torch.tensor(targets[row], device=device)
        logprobs = at.gather(1, target[:, None]).squeeze(1) - at.logsumexp(-1)
        hits = at.argmax(-1) == target
        sizes = [len(choice) for choice in item.choices]
        scores.append(
            [
                Score(float(part.sum()), bool(hit.all()))
                for part, hit in zip(logprobs.split(sizes), hits.split(sizes), strict=True)
            ]
        )
    return scores


def _tree(items: Sequence[ChoiceItem]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and positions (batch, seq), and who sees whom (batch, 1, seq, seq)."""
    width = max(item.tokens for item in items)
    input_ids, position_ids = (
        torch.zeros(len(items), width, dtype=torch.int64),
        torch.zeros(len(items), width, dtype=torch.int64),
    )
    mask = torch.eye(width, dtype=torch.bool).repeat(
        len(items), 1, 1
    )  # padding sees itself, or its softmax is 0 / 0
    for row, item in enumerate(items):
        context = len(item.context)
        input_ids[row, : item.tokens] = torch.tensor(
            item.context + [token for choice in item.choices for token in choice]
        )
        position_ids[row, :context] = torch.arange(context)
        mask[row, :context, :context] = torch.ones(context, context, dtype=torch.bool).tril()
        start = context
        for choice in item.choices:
            end = start + len(choice)
            position_ids[row, start:end] = torch.arange(context, context + len(choice))
            mask[row, start:end, :context] = True
            mask[row, start:end, start:end] = torch.ones(
                len(choice), len(choice), dtype=torch.bool
            ).tril()
            start = end
    return input_ids, position_ids, mask[:, None]


def _predicted(item: ChoiceItem) -> tuple[list[int], list[int]]:
    """For every token of every choice: the position that predicts it, and the token."""
    places, targets, start = list[int](), list[int](), len(item.context)
    for choice in item.choices:
        places += [len(item.context) - 1, *range(start, start + len(choice) - 1)]
        targets += choice
        start += len(choice)
    return places, targets


def _as_taken(mask: Tensor, model: Any) -> Tensor:
    """A boolean mask for sdpa; numbers to add for the other implementations."""
    if getattr(model.config, "_attn_implementation", "sdpa") == "sdpa":
        return mask
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


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
        raise goes_on_with_nothing(base.name)
    return TorchSubject(
        tokenizer,
        kind=base.kind,
        limit=base.max_length,
        pooling=base.pooling,
        before=before,
        after=after,
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
