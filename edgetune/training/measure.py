"""Measurements on held-out rows: validation metrics, and what the adapter changes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetune.batching import Batch, Example, in_order_of_length
from edgetune.metrics import accuracy, macro_f1
from edgetune.objectives import class_logits, completion_logits, masked_logits
from edgetune.training.device import device_of, to_device
from edgetune.training.precision import Precision, autocast
from edgetune.training.stage import Batching

ROWS_AT_ONCE = 64
TOKENS_AT_ONCE = 256  # the logits of a vocabulary take 200 kB a token, and the effect keeps six tensors of that size
VALIDATION_TOKENS = 50_000  # of more, a validation takes rows at equal distances; `edgetune eval` takes them all
EFFECT_TOKENS = 5_000

Logits = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]  # (model, batch) → logits (n, classes), targets (n,)


def batches_for_measuring(examples: Sequence[Example], batching: Batching, *, tokens: int) -> list[Batch]:
    """Batches over all rows, or over evenly spaced ones when there are more than `tokens` tokens; the same every time."""
    total = sum(batching.length(example) for example in examples)
    keep = min(len(examples), max(1, len(examples) * tokens // max(1, total)))
    chosen = [examples[at * len(examples) // keep] for at in range(keep)]
    lengths = [batching.length(example) for example in chosen]
    parts = in_order_of_length(lengths, TOKENS_AT_ONCE, batch_size=ROWS_AT_ONCE)
    return [batching.batch([chosen[i] for i in part], 0) for part in parts]


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
    model: nn.Module, batches: Sequence[Batch], *, precision: Precision, outputs: Logits = next_tokens
) -> dict[str, float]:
    """Cross entropy, perplexity and top-1 accuracy over the labelled tokens."""
    loss, hits, count = 0.0, 0, 0
    for logits, targets in outputs_of(model, batches, outputs, precision=precision):
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        hits += int((logits.argmax(-1) == targets).sum())
        count += targets.numel()
    mean = loss / max(1, count)
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "token_accuracy": hits / max(1, count)}


def measure_classes(model: nn.Module, batches: Sequence[Batch], *, precision: Precision) -> dict[str, float]:
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
    """How far the answers with the adapter are from those without it (or from those of the model `before` lends).

    `mean_kl`: KL(adapter on ‖ off) in nats; `mean_logit_change`: mean |Δ logit|; `top1_changed`: share of
    positions with another best answer. All are 0 for an adapter that does nothing. Off also means the head as
    it was before training. Of a single number (regression) only its mean change.
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
    return {"mean_kl": kl / count, "mean_logit_change": change / count, "top1_changed": changed / count}


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[Any]:
    """The base model's own answers (a PEFT model's `disable_adapter`), in evaluation mode."""
    with model.disable_adapter():
        model.eval()
        yield model


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
