"""Measurements on held-out rows: validation metrics, and what the adapter changes."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetune.adapters.lora import adapter_off
from edgetune.core.tag_sequences import likeliest_tags
from edgetune.core.text import outside_tag
from edgetune.data.batching import Batch, Example, in_order_of_length
from edgetune.metrics.labels import (
    accuracy,
    macro_f1,
    multi_label_metrics,
    regression_metrics,
    tag_metrics,
)
from edgetune.metrics.retrieval import find_own, nearest_other, retrieval_metrics
from edgetune.metrics.statistics import preference_metrics
from edgetune.models.torch_device import Precision, autocast, device_of, to_device
from edgetune.objectives.contrastive import ContrastBatch, embedded, own_cosines
from edgetune.objectives.labels import word_logits
from edgetune.objectives.language import class_logits, completion_logits, masked_logits
from edgetune.objectives.preference import PairBatch, implicit_rewards, pair_rewards
from edgetune.training.batches import Batching
from edgetune.training.context import Logits, Prepared, StageStart
from edgetune.training.fast.memory import computing

ROWS_AT_ONCE = 64
# the logits of a vocabulary take 200 kB a token, and the effect keeps six tensors of that size
TOKENS_AT_ONCE = 256
# of more, a validation takes rows at equal distances; `edgetune eval` takes them all
VALIDATION_TOKENS = 50_000
EFFECT_TOKENS = 5_000


def batches_for_measuring(
    examples: Sequence[Example], batching: Batching, *, tokens: int
) -> list[Batch]:
    """Batches over all rows, or over evenly spaced ones when there are more than `tokens` tokens;
    the same every time.
    """
    total = sum(batching.length(example) for example in examples)
    keep = min(len(examples), max(1, len(examples) * tokens // max(1, total)))
    chosen = [examples[at * len(examples) // keep] for at in range(keep)]
    lengths = [batching.length(example) for example in chosen]
    parts = in_order_of_length(lengths, TOKENS_AT_ONCE, batch_size=ROWS_AT_ONCE)
    return [batching.batch([chosen[i] for i in part], 0) for part in parts]


def tokens_to_measure(examples: Sequence[Example], batching: Batching) -> int:
    """Tokens of a validation over these rows."""
    return min(VALIDATION_TOKENS, sum(batching.length(example) for example in examples))


def next_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of the labelled tokens, and these tokens."""
    return completion_logits(model, batch)


def classes(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Class logits, and the classes."""
    return class_logits(model, batch), batch.labels


def masked_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of the hidden tokens, and these tokens."""
    return masked_logits(model, batch)


def measure_completions(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    precision: Precision,
    outputs: Logits = next_tokens,
) -> dict[str, float]:
    """Cross entropy, perplexity and top-1 accuracy over the labelled tokens."""
    loss, hits, count = 0.0, 0, 0
    for logits, targets in outputs_of(model, batches, outputs, precision=precision):
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        hits += int((logits.argmax(-1) == targets).sum())
        count += targets.numel()
    mean = loss / max(1, count)
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "token_accuracy": hits / max(1, count),
    }


def measure_classes(
    model: nn.Module, batches: Sequence[Batch], *, precision: Precision
) -> dict[str, float]:
    """Cross entropy, accuracy and macro-F1."""
    loss, predicted, expected = 0.0, list[str](), list[str]()
    for logits, targets in outputs_of(model, batches, classes, precision=precision):
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        predicted += map(str, logits.argmax(-1).tolist())
        expected += map(str, targets.tolist())
    return {
        "loss": loss / len(expected),
        "accuracy": accuracy(predicted, expected),
        "macro_f1": macro_f1(predicted, expected),
    }


def adapter_effect(
    model: Any,
    batches: Sequence[Batch],
    outputs: Logits,
    *,
    precision: Precision,
    before: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
) -> dict[str, float]:
    """How far the answers with the adapter are from those without it (or from those of the model
    `before` lends).

    `mean_kl`: KL(adapter on ‖ off) in nats; `mean_logit_change`: mean |Δ logit|; `top1_changed`:
    share of positions with another best answer. All are 0 for an adapter that does nothing. Off
    also means the head as it was before training. Of a single number (regression) only its mean
    change.
    """
    with_adapter = outputs_of(model, batches, outputs, precision=precision)
    kl = change = changed = 0.0
    count, single = 0, False
    for batch, (on, _) in zip(batches, with_adapter, strict=True):
        with adapter_off(model) if before is None else before() as without:
            ((off, _),) = outputs_of(without, [batch], outputs, precision=precision)
        log_on, log_off = on.log_softmax(-1), off.log_softmax(-1)
        kl += (log_on.exp() * (log_on - log_off)).sum().item()
        change += (on - off).abs().mean(-1).sum().item()
        changed += (on.argmax(-1) != off.argmax(-1)).sum().item()
        count, single = count + len(on), on.shape[-1] == 1
    if single:
        return {"mean_logit_change": change / count}
    return {
        "mean_kl": kl / count,
        "mean_logit_change": change / count,
        "top1_changed": changed / count,
    }


def outputs_of(
    model: nn.Module, batches: Iterable[Batch], outputs: Logits, *, precision: Precision
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `outputs` gives for each batch, without gradients, in evaluation mode."""
    model.eval()
    device = device_of(model)
    for batch in batches:
        with torch.no_grad(), autocast(precision, device):
            result = outputs(model, to_device(batch, device))
        yield result


def measure_contrasts(
    model: nn.Module, batches: Sequence[ContrastBatch], *, precision: Precision
) -> dict[str, float]:
    """Of pairs how well an anchor finds its own text among all, of rows with labels how often the
    nearest other row has the same, of pairs with a score its correlation with the cosine.
    """
    model.eval()
    found = []
    device = device_of(model)
    for batch in batches:
        batch = to_device(batch, device)
        with torch.no_grad(), computing(model, batch, precision):
            anchors, others = embedded(model, batch)
        found.append((anchors.cpu(), others.cpu()))
    anchors, others = (torch.cat(part) for part in zip(*found, strict=True))
    if all(batch.scores is not None for batch in batches):
        scores = torch.cat([batch.scores for batch in batches if batch.scores is not None])
        metrics = regression_metrics(own_cosines(anchors, others).tolist(), scores.tolist())
        return {name: metrics[name] for name in ("spearman", "pearson")}
    labels = [label for batch in batches for label in batch.classes or ()]
    if labels:
        nearest = nearest_other(anchors.numpy())
        return {"accuracy": accuracy([labels[at] for at in nearest], labels)}
    own = torch.cat([part[: len(first)] for first, part in found])
    keys = [(batch.keys[:n], batch.keys[n : 2 * n]) for batch in batches if (n := batch.targets)]
    ranks, _ = find_own(
        anchors.numpy(),
        own.numpy(),
        anchor_keys=[key for first, _ in keys for key in first],
        other_keys=[key for _, second in keys for key in second],
    )
    return retrieval_metrics(ranks)


TIE = 1e-4  # a smaller margin is rounding: a policy that is still its reference prefers nothing


def measure_rewards(
    model: nn.Module, batches: Sequence[PairBatch], *, precision: Precision
) -> dict[str, float]:
    """Bradley-Terry loss, mean margin, and preference accuracy beside the length baseline."""
    return _measure(model, batches, pair_rewards, precision=precision)


def measure_policy(
    model: nn.Module, batches: Sequence[PairBatch], *, precision: Precision, beta: float = 1.0
) -> dict[str, float]:
    """DPO loss, mean margin of the implicit rewards, and their preference accuracy beside the
    length baseline.

    A policy that is still its reference is undecided everywhere: accuracy ½, margin 0.
    """
    return _measure(
        model, batches, lambda m, b: implicit_rewards(m, b, beta=beta), precision=precision
    )


def preferences(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Rewards as the logits (n, 2) of "which answer is better", and the right choice: 0."""
    rewards = torch.stack(pair_rewards(model, batch), dim=-1)
    return rewards, torch.zeros(len(rewards), dtype=torch.int64, device=rewards.device)


def _measure(
    model: nn.Module, batches: Sequence[PairBatch], scores: Any, *, precision: Precision
) -> dict[str, float]:
    """Metrics of `scores` (model, batch) → scores (n,) of the chosen and the rejected answers."""
    model.eval()
    device = device_of(model)
    margins: list[float] = []
    longer: list[float] = []
    for batch in batches:
        batch = to_device(batch, device)
        with torch.no_grad(), computing(model, batch, precision):
            chosen, rejected = scores(model, batch)
        margins += (chosen - rejected).tolist()
        longer += batch.longer
    loss = -F.logsigmoid(torch.tensor(margins, dtype=torch.float64)).mean().item()
    right = [0.5 if abs(margin) < TIE else float(margin > 0) for margin in margins]
    return {
        "loss": loss,
        **preference_metrics(right, longer),
        "margin": sum(margins) / len(margins),
    }


def measure_label_sets(
    model: nn.Module, batches: Sequence[Batch], *, precision: Precision
) -> dict[str, float]:
    """Binary cross entropy a label, and `multi_label_metrics`."""
    loss, count = 0.0, 0
    predicted, expected = list[list[str]](), list[list[str]]()
    for logits, targets in outputs_of(model, batches, _targets, precision=precision):
        loss += F.binary_cross_entropy_with_logits(logits, targets, reduction="sum").item()
        count += targets.numel()
        predicted += [_on(row) for row in logits >= 0]
        expected += [_on(row) for row in targets > 0]
    return {"loss": loss / max(1, count), **multi_label_metrics(predicted, expected)}


def measure_values(
    model: nn.Module, batches: Sequence[Batch], *, precision: Precision
) -> dict[str, float]:
    """Mean squared error (the loss), and `regression_metrics`."""
    predicted, expected = list[float](), list[float]()
    for logits, targets in outputs_of(model, batches, _targets, precision=precision):
        predicted += logits.squeeze(-1).tolist()
        expected += targets.tolist()
    metrics = regression_metrics(predicted, expected)
    return {"loss": metrics.pop("mse"), **metrics}


def _targets(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return class_logits(model, batch), batch.labels


def _on(row: torch.Tensor) -> list[str]:
    """The numbers of the labels that are set, as names."""
    return [str(label) for label in row.nonzero().flatten().tolist()]


@contextlib.contextmanager
def prepare_tagging(start: StageStart) -> Iterator[Prepared]:
    """Validation needs the sentences: words that no batch holds count as well, as O."""
    examples = start.stage.examples
    sentences = {example.row: example for example in examples.validation}
    yield Prepared(
        functools.partial(
            measure_tags,
            sentences=sentences,
            names=examples.labels or (),
            scheme=examples.prompt_format.tag_scheme,
        )
    )


def measure_tags(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    precision: Precision,
    sentences: Mapping[int, Any],
    names: Sequence[str],
    scheme: str | None = None,
) -> dict[str, float]:
    """Cross entropy a word that is seen, and `tag_metrics` over all words of the batches' rows."""
    loss, count = 0.0, 0
    predicted, expected = list[list[str]](), list[Sequence[str]]()
    outside = outside_tag(names)
    for batch, (logits, targets) in zip(
        batches, outputs_of(model, batches, word_logits, precision=precision), strict=True
    ):
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        count += targets.numel()
        rows = iter(logits.cpu().numpy())  # sentence after sentence, word after word
        for line in batch.rows:
            example = sentences[line]
            seen = [None if token is None else next(rows) for token in example.first]
            best = likeliest_tags(seen, names, scheme=scheme)
            predicted.append([outside if tag is None else names[tag] for tag in best])
            expected.append(example.tags)
    return {"loss": loss / max(1, count), **tag_metrics(predicted, expected, names)}
