"""A score of any kind becomes the probability that an answer is right."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def fit_platt(scores: npt.ArrayLike, right: npt.ArrayLike) -> tuple[float, float]:
    """Slope (0 or more) and intercept of 1 / (1 + exp(-(slope · score + intercept))) by the scores
    (rows,) of answers and whether each is right (Platt 1999).

    Its targets are Platt's own, (n + 1) / (n + 2) for the n right answers and 1 / (n + 2) for the n
    wrong ones, so that answers that are all right do not ask for a slope without end.
    """
    from scipy.optimize import minimize

    x, hits = np.asarray(scores, np.float64), np.asarray(right, bool)
    centre, width = float(x.mean()), float(x.std()) or 1.0
    unit = (x - centre) / width
    yes, no = int(hits.sum()), int((~hits).sum())
    targets = np.where(hits, (yes + 1) / (yes + 2), 1 / (no + 2))

    def loss(parameters: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        z = parameters[0] * unit + parameters[1]
        off = 0.5 * (1 + np.tanh(0.5 * z)) - targets
        value = float((np.logaddexp(0, z) - targets * z).mean())
        return value, np.array([(off * unit).mean(), off.mean()])

    bounds = [(0.0, None), (None, None)]
    found = minimize(loss, np.array([1.0, 0.0]), jac=True, bounds=bounds, method="L-BFGS-B")
    slope = float(found.x[0]) / width
    return round(slope, 6), round(float(found.x[1]) - slope * centre, 6)
