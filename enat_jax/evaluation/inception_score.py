"""The Inception Score: how sure a classifier is of images, and how much they vary."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax, xlogy

from enat_jax.errors import UserError
from enat_jax.evaluation.metric import Metric

SPLITS = 10


class Sums(NamedTuple):
    """Running sums of images by split, in float64.

    Attributes:
        counts: images.
        probabilities: their class probabilities; of no image `[s 1]`.
        log_probabilities: of an image, `sum_c p log p`.
    """

    counts: Float[np.ndarray, " s"]
    probabilities: Float[np.ndarray, "s _"]
    log_probabilities: Float[np.ndarray, " s"]


def inception_score(images: int, splits: int = SPLITS) -> Metric:
    """The metric of a known number of images, that sees their logits (see `Features`).

    Of a split, `exp(mean_i KL(p_i | mean_j p_j))` (Salimans et al. 2016); of them all, the mean and
    the standard deviation. Images fall into splits of (nearly) equal size by their number, through
    a fixed permutation: generated images come in order of class, and a split of a tenth of the
    classes would score a tenth.

    Raises:
        UserError: fewer images than splits.
    """
    if not 1 <= splits <= images:
        raise UserError(
            f"inception score: {images} images for {splits} splits, want one each at least"
        )
    # NumPy never changes what a `RandomState` draws
    split_of = np.random.RandomState(0).permutation(images) * splits // images

    def add(sums: Sums, seen: Any, class_ids: np.ndarray) -> Sums:
        logs = log_softmax(np.asarray(seen.logits, np.float64), axis=1)
        first = int(sums.counts.sum())
        member = split_of[first : first + len(logs)] == np.arange(splits)[:, None]
        by_image = np.ones(len(logs)), np.exp(logs), np.sum(np.exp(logs) * logs, axis=1)
        return Sums(*(before + member @ x for before, x in zip(sums, by_image, strict=True)))

    def value(sums: Sums) -> dict[str, dict[str, float]]:
        if sums.counts.sum() != images:
            raise UserError(
                f"inception score: {sums.counts.sum():.0f} of {images} images were added"
            )
        marginal = sums.probabilities / sums.counts[:, None]
        entropies = -xlogy(marginal, marginal).sum(axis=1)
        scores = np.exp(sums.log_probabilities / sums.counts + entropies)
        score = {"mean": float(scores.mean()), "spread": float(scores.std()), "splits": splits}
        return {"inception_score": score}

    zeros = np.zeros(splits)
    return Metric(("inception_score",), lambda: Sums(zeros, zeros[:, None], zeros), add, value)
