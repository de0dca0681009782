"""Scores of generated handwritten digits: what a classifier reads, and how the pixels spread."""

from typing import Any, cast

import numpy as np
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from enat_jax.errors import UserError
from enat_jax.evaluation.frechet import Moments, frechet
from enat_jax.evaluation.metric import Metric, Objective


def digits_objective(real: Float[np.ndarray, "m 64"], labels: Int[np.ndarray, " m"]) -> Objective:
    """The Frechet distance of the pixel values (0 to 16) to real digits, and the accuracy.

    That is the share that a support vector classifier, trained on the real ones, reads as the
    class they should be.
    """
    pixels = Moments.empty(64).add(real).gaussian()
    reader = SVC(gamma=cast(Any, 0.001)).fit(real, labels)

    def add(sums: np.ndarray, seen: np.ndarray, class_ids: np.ndarray) -> np.ndarray:
        return sums + np.array([np.sum(reader.predict(seen) == class_ids), len(seen)])

    def value(sums: np.ndarray) -> dict[str, float]:
        right, count = sums
        if not count:
            raise UserError("accuracy needs at least 1 digit")
        return {"accuracy": float(right / count)}

    accuracy = Metric(("accuracy",), lambda: np.zeros(2, np.int64), add, value)
    return Objective("token_ids", (frechet("frechet_distance", pixels), accuracy))


def real_halves(seed: int = 0) -> dict[str, float]:
    """The same scores for real digits: one random half read and measured against the other."""
    real, labels = load_digits(return_X_y=True)
    one, other = np.array_split(np.random.default_rng(seed).permutation(len(real)), 2)
    scorer = digits_objective(real[other], labels[other]).start()
    scorer.add(real[one], labels[one])
    return scorer.value()
