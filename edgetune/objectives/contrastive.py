"""Embeddings: batches of texts that are alike, and the objectives `contrastive`.

In-batch negatives as sentence-transformers' MultipleNegativesRankingLoss (Henderson et al. 2017,
arXiv:1705.00652), where texts that a batch says are alike are no negatives of each other; and of
pairs with a number CoSENT (Su 2022), which only asks for their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetune.data.batching import Batch
from edgetune.data.collation import collate
from edgetune.data.contrasts import ContrastExample
from edgetune.models.heads import unwrapped


@dataclass(frozen=True, slots=True)
class ContrastBatch(Batch):
    """k·n right-padded rows: the n anchors, then the n texts that are like them, then, of triplets,
    the n that are not. `targets` is n; `labels` holds (k·n,) zeros.
    """

    scores: Tensor | None = None  # (n,) how much alike the two texts of a row are
    # (n, (k-1)·n), whether an anchor is told apart from a text: its own one, and all unlike it
    told_apart: Tensor | None = None
    keys: tuple[int, ...] = ()  # of the k·n texts: equal texts have equal ones, in every batch
    classes: tuple[str, ...] | None = None  # of the n anchors, where rows have labels


@dataclass(frozen=True, slots=True)
class _Text:
    """One text as a row of a batch."""

    input_ids: list[int]
    labels: int
    row: int


def collate_contrasts(examples: Sequence[ContrastExample], pad_id: int) -> ContrastBatch:
    """Examples → one batch, anchors first."""
    columns = list(zip(*((e.input_ids, *e.others) for e in examples), strict=True))
    texts = [
        _Text(ids, 0, example.row)
        for column in columns
        for ids, example in zip(column, examples, strict=True)
    ]
    batch = collate(texts, pad_id)
    targets = [example.target for example in examples]
    scored = all(isinstance(target, float) for target in targets)
    classes = tuple(target for target in targets if isinstance(target, str))
    keys = tuple(hash(tuple(text.input_ids)) for text in texts)
    return ContrastBatch(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        rows=tuple(example.row for example in examples),
        tokens=batch.tokens,
        targets=len(examples),
        scores=torch.tensor(targets, dtype=torch.float32) if scored else None,
        told_apart=None if scored else told_apart(keys, len(examples), classes),
        keys=keys,
        classes=classes or None,
    )


def told_apart(keys: Sequence[int], rows: int, classes: Sequence[str]) -> Tensor:
    """(rows, texts that are no anchors) bool: true for a row's own positive, and for every text
    that is neither the anchor itself, nor said to be like it, nor of its class.
    """
    anchors, others = keys[:rows], keys[rows:]
    alike = set(zip(anchors, others[:rows], strict=False))
    allowed = torch.ones(rows, len(others), dtype=torch.bool)
    for row, anchor in enumerate(anchors):
        for column, other in enumerate(others):
            same_class = bool(classes) and classes[row] == classes[column % rows]
            if column != row and (other == anchor or (anchor, other) in alike or same_class):
                allowed[row, column] = False
    return allowed


def contrastive(model: nn.Module, batch: ContrastBatch, *, scale: float) -> tuple[Tensor, int]:
    """Cross entropy of finding each anchor's own text among the batch's by its scaled cosine; of
    rows with scores CoSENT.
    """
    anchors, others = embedded(model, batch)
    if batch.scores is not None:
        return cosent(own_cosines(anchors, others), batch.scores, scale=scale), batch.targets
    logits = scale * anchors @ others.T
    if batch.told_apart is not None:
        logits = logits.masked_fill(~batch.told_apart, -torch.inf)
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, own), batch.targets


def cosent(cosines: Tensor, scores: Tensor, *, scale: float) -> Tensor:
    """log(1 + Σ exp(scale · (cosine of the less alike − cosine of the more alike))) over all two
    pairs of texts whose scores differ.
    """
    more = scores[:, None] > scores[None, :]  # (n, n): row is more alike than column
    differences = scale * (cosines[None, :] - cosines[:, None])
    terms = differences.masked_fill(~more, -torch.inf).flatten()
    return torch.logsumexp(torch.cat([terms.new_zeros(1), terms]), dim=0) + 0.0 * cosines.sum()


def coordinates(model: nn.Module, batch: ContrastBatch) -> tuple[Tensor, Tensor]:
    """What the method answers, for the effect of an adapter: every number of the anchors'
    embeddings (n · hidden, 1). There are no right ones; zeros stand for them.
    """
    anchors, _ = embedded(model, batch)
    numbers = anchors.reshape(-1, 1)
    return numbers, torch.zeros(len(numbers), dtype=torch.int64, device=numbers.device)


def embedded(model: Any, batch: ContrastBatch) -> tuple[Tensor, Tensor]:
    """Unit-length embeddings in fp32: of the anchors (n, hidden), and of the other texts, where
    there are none of the anchors once more.
    """
    pooled = unwrapped(model).pooled(batch.input_ids, batch.attention_mask)
    unit = F.normalize(pooled.float(), dim=-1)
    others = unit[batch.targets :]
    return unit[: batch.targets], others if len(others) else unit


def own_cosines(anchors: Tensor, others: Tensor) -> Tensor:
    """The cosine of each anchor and its own text (n,)."""
    return (anchors * others[: len(anchors)]).sum(-1)
