"""A head's first weights: regression on the frozen body's features (LP-FT, Kumar et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgetune.core.tasks import Problem
from edgetune.data.batching import IGNORE, Example, in_order_of_length
from edgetune.data.collation import collate, collate_tagged
from edgetune.data.examples import ExampleSet
from edgetune.data.tagging import TaggedExample
from edgetune.models.heads import RewardModel, SequenceClassifier, TokenClassifier
from edgetune.models.torch_device import device_of, to_device
from edgetune.objectives.preference import collate_pairs
from edgetune.training.class_weights import by_class

TOKENS_AT_ONCE, ROWS_AT_ONCE = 4096, 64
# inverse L2 strength; by development rows of Banking77, flat between 10 and 100 for 5, 10 and 100
# rows a label
C = 30.0
REWARD_C, REWARD_FOLDS_FROM = (0.01, 0.1, 1.0, 10.0, 100.0), 50


def fit_probe(
    model: SequenceClassifier,
    examples: Sequence[Example],
    *,
    pad_id: int,
    weights: Tensor | None = None,
) -> None:
    """Set `model.output` to an L2-regularised logistic regression on what it reads.

    The regression sees features of length 1 and has no intercept: the best label for a feature is
    then the same at any length, so its weights hold for the raw pooled features too (divided by
    their mean length).
    """
    targets = np.array([example.labels for example in examples])
    if len(np.unique(targets)) > 1:
        features = output_features(model, examples, pad_id=pad_id)
        fit_logistic(model.output, features, targets, weights=weights)


def fit_logistic(
    head: nn.Linear,
    features: NDArray[np.float32],
    targets: NDArray[np.int64],
    *,
    weights: Tensor | None = None,
) -> None:
    """Set a head (labels, hidden) to the regression of `fit_probe` on features (rows, hidden) and
    classes (rows,), weighed by `weights` (labels,).
    """
    from sklearn.linear_model import LogisticRegression

    present = np.unique(targets)
    if len(present) < 2:
        return
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    regression = LogisticRegression(
        C=C, fit_intercept=False, max_iter=1000, class_weight=by_class(weights, present)
    ).fit(features / lengths, targets)
    fitted = regression.coef_ / float(lengths.mean())
    if len(present) == 2:  # scikit-learn gives one row, for the second of two classes
        fitted = np.concatenate([-fitted / 2, fitted / 2])
    with torch.no_grad():
        head.weight.zero_()
        head.weight[torch.from_numpy(present).to(head.weight.device)] = torch.from_numpy(fitted).to(
            head.weight
        )
        if head.bias is not None:
            head.bias.zero_()


def fit_reward_probe(model: RewardModel, pairs: Sequence[Any], *, pad_id: int) -> None:
    """Set `model.score` to the Bradley-Terry model of the frozen body's features: a logistic
    regression, without intercept, on the differences between the chosen and the rejected answer's
    features.

    Its L2 strength is chosen by cross validation on these pairs; with fewer than REWARD_FOLDS_FROM
    it is 1.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    differences = pair_differences(model, pairs, pad_id=pad_id)
    scale = float(np.sqrt((differences**2).sum(axis=1).mean())) or 1.0
    signs = np.where(
        np.arange(len(pairs)) % 2, -1.0, 1.0
    )  # half of the pairs the other way round: two classes
    features, targets = differences / scale * signs[:, None], signs > 0
    if len(pairs) < 2:
        return

    def regression(c: float) -> LogisticRegression:
        return LogisticRegression(C=c, fit_intercept=False, max_iter=1000)

    best = 1.0
    if len(pairs) >= REWARD_FOLDS_FROM:
        best = max(
            REWARD_C,
            key=lambda c: cross_val_score(
                regression(c), features, targets, scoring="neg_log_loss"
            ).mean(),
        )
    fitted = regression(best).fit(features, targets)
    with torch.no_grad():
        model.score.weight.copy_(torch.from_numpy(fitted.coef_ / scale))


@torch.no_grad()
def pair_differences(
    model: RewardModel, pairs: Sequence[Any], *, pad_id: int
) -> NDArray[np.float32]:
    """(pairs, hidden): the chosen answer's feature minus the rejected one's."""
    model.eval()
    found = np.empty((len(pairs), model.score.in_features), dtype=np.float32)
    lengths, device = [pair.padded_length for pair in pairs], device_of(model)
    for part in in_order_of_length(lengths, TOKENS_AT_ONCE, batch_size=ROWS_AT_ONCE):
        batch = to_device(collate_pairs([pairs[index] for index in part], pad_id), device)
        chosen, rejected = model.pooled(batch.input_ids, batch.attention_mask).chunk(2)
        found[part] = (chosen - rejected).cpu().numpy()
    return found


@torch.no_grad()
def pooled_features(
    model: SequenceClassifier, examples: Sequence[Example], *, pad_id: int
) -> NDArray[np.float32]:
    """(rows, hidden) features of the frozen body, in the order of the examples; those that they
    carry already.
    """
    known = [
        feature
        for example in examples
        if (feature := getattr(example, "features", None)) is not None
    ]
    if known:
        stacked: NDArray[np.float32] = torch.stack(known).numpy()
        return stacked
    model.eval()
    features = np.empty((len(examples), model.config.hidden_size), dtype=np.float32)
    lengths, device = [len(example.input_ids) for example in examples], device_of(model)
    for part in in_order_of_length(lengths, TOKENS_AT_ONCE, batch_size=ROWS_AT_ONCE):
        batch = to_device(collate([examples[index] for index in part], pad_id), device)
        features[part] = (
            model.features(batch.input_ids, batch.attention_mask, batch.token_type_ids)
            .float()
            .cpu()
            .numpy()
        )
    return features


@torch.no_grad()
def output_features(
    model: SequenceClassifier, examples: Sequence[Any], *, pad_id: int
) -> NDArray[np.float32]:
    """(rows, hidden): what the head's last layer reads, all before it as it is now."""
    features = pooled_features(model, examples, pad_id=pad_id)
    model.eval()
    found = model.before_output(torch.from_numpy(features).to(model.output.weight))
    result: NDArray[np.float32] = found.float().cpu().numpy()
    return result


RIDGE = np.logspace(
    -3, 2, 11
)  # L2 strengths, on features of length 1; leave-one-out cross validation chooses


def fit_head(
    model: SequenceClassifier,
    examples: Sequence[Any],
    *,
    problem: Problem,
    pad_id: int,
    weights: Tensor | None = None,
) -> None:
    """The head's first weights on the frozen body's features, as its task needs them; `weights`
    (labels,) are those of the loss.
    """
    if isinstance(model, TokenClassifier):
        fit_word_probe(model, examples, pad_id=pad_id, weights=weights)
    elif problem == "multi-label":
        fit_label_probes(model, examples, pad_id=pad_id, weights=weights)
    elif problem == "regression":
        fit_value_probe(model, examples, pad_id=pad_id)
    else:
        fit_probe(model, examples, pad_id=pad_id, weights=weights)


def fit_label_probes(
    model: SequenceClassifier,
    examples: Sequence[Any],
    *,
    pad_id: int,
    weights: Tensor | None = None,
) -> None:
    """One logistic regression a label, on features of length 1; a label that all or no rows have
    gets its log odds.
    """
    from sklearn.linear_model import LogisticRegression

    features, scale = _unit_features(model, examples, pad_id=pad_id)
    targets = np.array([example.target for example in examples])  # (rows, labels)
    fitted, biases = np.zeros((targets.shape[1], features.shape[1])), np.zeros(targets.shape[1])
    for label, column in enumerate(targets.T):
        if 0 < column.sum() < len(column):
            with_bias = model.output.bias is not None
            class_weight = None if weights is None else {1.0: float(weights[label])}
            one = LogisticRegression(
                C=C, max_iter=1000, fit_intercept=with_bias, class_weight=class_weight
            ).fit(features, column)
            fitted[label], biases[label] = one.coef_[0] / scale, np.ravel(one.intercept_)[0]
        else:
            biases[label] = np.log((column.sum() + 1) / (len(column) - column.sum() + 1))
    _set(model.output, fitted, biases)


def fit_value_probe(model: SequenceClassifier, examples: Sequence[Any], *, pad_id: int) -> None:
    """Ridge regression on features of length 1; the mean of the numbers where they are all the
    same.
    """
    from sklearn.linear_model import RidgeCV

    targets = np.array([example.target for example in examples])
    if np.ptp(targets) == 0:
        _set(model.output, np.zeros((1, model.config.hidden_size)), targets[:1])
        return
    features, scale = _unit_features(model, examples, pad_id=pad_id)
    with_bias = model.output.bias is not None
    fitted = RidgeCV(alphas=RIDGE, fit_intercept=with_bias).fit(features, targets)
    _set(model.output, fitted.coef_[None] / scale, np.array([fitted.intercept_]))


def _unit_features(
    model: SequenceClassifier, examples: Sequence[Any], *, pad_id: int
) -> tuple[NDArray[np.float32], float]:
    """Features of length 1, and their mean length, by which the raw ones are about larger."""
    features = output_features(model, examples, pad_id=pad_id)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit: NDArray[np.float32] = features / np.maximum(lengths, 1e-12)
    return unit, float(lengths.mean()) or 1.0


def _set(head: nn.Linear, weights: NDArray[np.float64], biases: NDArray[np.float64]) -> None:
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weights))
        if head.bias is not None:
            head.bias.copy_(torch.from_numpy(biases))


PROBE_WORDS = 20_000  # of more, the first weights are fitted to rows at equal distances


def keep_features(model: Any, examples: ExampleSet, *, pad_id: int) -> None:
    """Give every example its pooled features, or those of its single words where words are tagged,
    in fp32: where only the head learns, the body runs once.
    """
    for rows in (examples.train, examples.validation):
        tagged: list[Any] = [*rows]
        if isinstance(model, TokenClassifier):
            found = word_states(model, tagged, pad_id=pad_id)
        elif rows:
            found = list(torch.from_numpy(pooled_features(model, rows, pad_id=pad_id)))
        else:
            found = []
        for example, features in zip(rows, found, strict=True):
            example.features = features


@torch.no_grad()
def word_states(
    model: TokenClassifier, examples: Sequence[TaggedExample], *, pad_id: int
) -> list[Tensor]:
    """(words, hidden) of each example on the CPU, at the first sub-words of the words that are
    seen.
    """
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


def fit_word_probe(
    model: TokenClassifier,
    examples: Sequence[TaggedExample],
    *,
    pad_id: int,
    weights: Tensor | None = None,
) -> None:
    """Set `model.output` to a logistic regression on what it reads of single words; see
    `fit_logistic`.
    """
    words = sum(len(example.first) for example in examples)
    keep = min(len(examples), max(1, len(examples) * PROBE_WORDS // max(1, words)))
    chosen = [examples[at * len(examples) // keep] for at in range(keep)]
    words_seen = torch.cat(word_states(model, chosen, pad_id=pad_id)).to(model.output.weight)
    with torch.no_grad():
        states = model.before_output(words_seen).float().cpu().numpy()
    labels = [
        label
        for example in chosen
        if isinstance(example.labels, list)
        for label in example.labels
        if label != IGNORE
    ]
    fit_logistic(model.output, states, torch.tensor(labels).numpy(), weights=weights)
