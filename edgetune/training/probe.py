"""The head's first weights: logistic regression on the frozen body's features.

Fine-tuning from a head that already fits distorts the pretrained features less than from a random one
(LP-FT: Kumar et al. 2022, arXiv:2202.10054).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from edgetune.batching import Example, collate, in_order_of_length
from edgetune.heads import SequenceClassifier
from edgetune.training.device import device_of, to_device

TOKENS_AT_ONCE, ROWS_AT_ONCE = 4096, 64
C = 30.0  # inverse L2 strength; by development rows of Banking77, flat between 10 and 100 for 5, 10 and 100 rows a label


def fit_probe(model: SequenceClassifier, examples: Sequence[Example], *, pad_id: int) -> None:
    """Set `model.classifier` to an L2-regularised logistic regression on the pooled features.

    The regression sees features of length 1 and has no intercept: the best label for a feature is then the same
    at any length, so its weights hold for the raw pooled features too (divided by their mean length).
    """
    from sklearn.linear_model import LogisticRegression

    targets = np.array([example.labels for example in examples])
    present = np.unique(targets)
    if len(present) < 2:
        return
    features = pooled_features(model, examples, pad_id=pad_id)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    regression = LogisticRegression(C=C, fit_intercept=False, max_iter=1000).fit(features / lengths, targets)
    weights = regression.coef_ / float(lengths.mean())
    if len(present) == 2:  # scikit-learn gives one row, for the second of two classes
        weights = np.concatenate([-weights / 2, weights / 2])
    with torch.no_grad():
        head = model.classifier
        head.weight.zero_()
        head.weight[torch.from_numpy(present).to(head.weight.device)] = torch.from_numpy(weights).to(head.weight)
        head.bias.zero_()


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
        features[part] = model.pooled(batch.input_ids, batch.attention_mask).float().cpu().numpy()
    return features
