"""Training of word tags: validation on whole sentences, the features of words, and the head's first weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetune.batching import IGNORE, Batch, in_order_of_length
from edgetune.examples import ExampleSet
from edgetune.examples.tagging import TaggedExample, collate_tagged
from edgetune.tag_metrics import tag_metrics
from edgetune.token_classifier import TokenClassifier, word_logits
from edgetune.training.device import device_of, to_device
from edgetune.training.measure import outputs_of
from edgetune.training.precision import Precision
from edgetune.training.probe import ROWS_AT_ONCE, TOKENS_AT_ONCE, fit_logistic
from edgetune.training.stage import Measure, Prepared, Situation
from edgetune.words import OUTSIDE

PROBE_WORDS = 20_000  # of more, the first weights are fitted to rows at equal distances


@contextlib.contextmanager
def prepare_tagging(situation: Situation, measure: Measure) -> Iterator[Prepared]:
    """Validation needs the sentences: words that no batch holds count as well, as O."""
    examples = situation.examples
    sentences = {example.row: example for example in examples.validation}
    yield Prepared(functools.partial(measure_tags, sentences=sentences, names=examples.labels or ()))


def measure_tags(
    model: nn.Module, batches: Sequence[Batch], *, precision: Precision, sentences: Mapping[int, Any], names: Sequence[str]
) -> dict[str, float]:
    """Cross entropy a word that is seen, and `tag_metrics` over all words of the batches' rows."""
    loss, count = 0.0, 0
    predicted, expected = list[list[str]](), list[Sequence[str]]()
    for batch, (logits, targets) in zip(batches, outputs_of(model, batches, word_logits, precision=precision), strict=True):
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        count += targets.numel()
        best = iter(logits.argmax(-1).tolist())  # row after row, word after word
        for line in batch.rows:
            example = sentences[line]
            predicted.append([OUTSIDE if token is None else names[next(best)] for token in example.first])
            expected.append(example.tags)
    return {"loss": loss / max(1, count), **tag_metrics(predicted, expected, names)}


def with_word_features(model: TokenClassifier, examples: ExampleSet, *, pad_id: int) -> ExampleSet:
    """The set with the states of every labelled token in fp32: where only the head learns, the body runs once."""

    def featured(rows: Sequence[Any]) -> list[Any]:
        return [replace(row, features=states) for row, states in zip(rows, word_states(model, rows, pad_id=pad_id), strict=True)]

    return replace(examples, train=featured(examples.train), validation=featured(examples.validation))


@torch.no_grad()
def word_states(model: TokenClassifier, examples: Sequence[TaggedExample], *, pad_id: int) -> list[Tensor]:
    """(words, hidden) of each example on the CPU, at the first sub-words of the words that are seen."""
    if examples and all(example.features is not None for example in examples):
        return [example.features for example in examples if example.features is not None]
    model.eval()
    device, lengths = device_of(model), [len(example.input_ids) for example in examples]
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    for part in in_order_of_length(lengths, TOKENS_AT_ONCE, batch_size=ROWS_AT_ONCE):
        batch = to_device(collate_tagged([examples[at] for at in part], pad_id), device)
        labelled = batch.labels != IGNORE
        states = model.states(batch.input_ids, batch.attention_mask)[labelled].float().cpu()
        for at, words in zip(part, states.split(labelled.sum(1).tolist()), strict=True):
            found[at] = words
    return found


def fit_word_probe(model: TokenClassifier, examples: Sequence[TaggedExample], *, pad_id: int) -> None:
    """Set `model.classifier` to a logistic regression on the states of single words; see `fit_logistic`."""
    words = sum(len(example.first) for example in examples)
    keep = min(len(examples), max(1, len(examples) * PROBE_WORDS // max(1, words)))
    chosen = [examples[at * len(examples) // keep] for at in range(keep)]
    states = torch.cat(word_states(model, chosen, pad_id=pad_id)).numpy()
    labels = [label for example in chosen if isinstance(example.labels, list) for label in example.labels if label != IGNORE]
    fit_logistic(model.classifier, states, torch.tensor(labels).numpy())
