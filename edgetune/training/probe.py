"""The head's first weights: logistic regression on the frozen body's features.

Fine-tuning from a head that already fits distorts the pretrained features less than from a random one
(LP-FT: Kumar et al. 2022, arXiv:2202.10054).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgetune.batching import Example, collate, in_order_of_length
from edgetune.heads import RewardModel, SequenceClassifier
from edgetune.preference import collate_pairs
from edgetune.training.device import device_of, to_device

TOKENS_AT_ONCE, ROWS_AT_ONCE = 4096, 64
C = 30.0  # inverse L2 strength; by development rows of Banking77, flat between 10 and 100 for 5, 10 and 100 rows a label

REWARD_C, REWARD_FOLDS_FROM = (0.01, 0.1, 1.0, 10.0, 100.0), 50


def fit_probe(model: SequenceClassifier, examples: Sequence[Example], *, pad_id: int) -> None:
    """Set `model.classifier` to an L2-regularised logistic regression on the pooled features.

    The regression sees features of length 1 and has no intercept: the best label for a feature is then the same
    at any length, so its weights hold for the raw pooled features too (divided by their mean length).
    """
    targets = np.array([example.labels for example in examples])
    if len(np.unique(targets)) > 1:
        fit_logistic(model.classifier, pooled_features(model, examples, pad_id=pad_id), targets)


def fit_logistic(head: nn.Linear, features: NDArray[np.float32], targets: NDArray[np.int64]) -> None:
    """Set a head (labels, hidden) to the regression of `fit_probe` on features (rows, hidden) and classes (rows,)."""
    from sklearn.linear_model import LogisticRegression

    present = np.unique(targets)
    if len(present) < 2:
        return
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    regression = LogisticRegression(C=C, fit_intercept=False, max_iter=1000).fit(features / lengths, targets)
    weights = regression.coef_ / float(lengths.mean())
    if len(present) == 2:  # scikit-learn gives one row, for the second of two classes
        weights = np.concatenate([-weights / 2, weights / 2])
    with torch.no_grad():
        head.weight.zero_()
        head.weight[torch.from_numpy(present).to(head.weight.device)] = torch.from_numpy(weights).to(head.weight)
        head.bias.zero_()


def fit_reward_probe(model: RewardModel, pairs: Sequence[Any], *, pad_id: int) -> None:
    """Set `model.score` to the Bradley-Terry model of the frozen body's features: a logistic regression, without
    intercept, on the differences between the chosen and the rejected answer's features.

    Its L2 strength is chosen by cross validation on these pairs; with fewer than REWARD_FOLDS_FROM it is 1.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    differences = pair_differences(model, pairs, pad_id=pad_id)
    scale = float(np.sqrt((differences**2).sum(axis=1).mean())) or 1.0
    signs = np.where(np.arange(len(pairs)) % 2, -1.0, 1.0)  # half of the pairs the other way round: two classes
    features, targets = differences / scale * signs[:, None], signs > 0
    if len(pairs) < 2:
        return

    def regression(c: float) -> LogisticRegression:
        return LogisticRegression(C=c, fit_intercept=False, max_iter=1000)

    best = 1.0
    if len(pairs) >= REWARD_FOLDS_FROM:
        best = max(REWARD_C, key=lambda c: cross_val_score(regression(c), features, targets, scoring="neg_log_loss").mean())
    fitted = regression(best).fit(features, targets)
    with torch.no_grad():
        model.score.weight.copy_(torch.from_numpy(fitted.coef_ / scale))


@torch.no_grad()
def pair_differences(model: RewardModel, pairs: Sequence[Any], *, pad_id: int) -> NDArray[np.float32]:
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
def pooled_features(model: SequenceClassifier, examples: Sequence[Example], *, pad_id: int) -> NDArray[np.float32]:
    """(rows, hidden) features of the frozen body, in the order of the examples; those that they carry already."""
    known = [feature for example in examples if (feature := getattr(example, "features", None)) is not None]
    if known:
        stacked: NDArray[np.float32] = torch.stack(known).numpy()
        return stacked
    model.eval()
    features = np.empty((len(examples), model.classifier.in_features), dtype=np.float32)
    lengths, device = [len(example.input_ids) for example in examples], device_of(model)
    for part in in_order_of_length(lengths, TOKENS_AT_ONCE, batch_size=ROWS_AT_ONCE):
        batch = to_device(collate([examples[index] for index in part], pad_id), device)
        features[part] = model.pooled(batch.input_ids, batch.attention_mask, batch.token_type_ids).float().cpu().numpy()
    return features
