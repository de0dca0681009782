"""Scores computed from features of images."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Real
from scipy.special import log_softmax

from enat_jax.errors import UserError

SPLITS = 10


def frechet_distance(a: Real[np.ndarray, "b p"], b: Real[np.ndarray, "m p"]) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, in float64.

    Args:
        a: at least two samples.
        b: at least two samples of as many features.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    covariances = [np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b)]
    return frechet_distance_of_moments(
        a.mean(axis=0), covariances[0], b.mean(axis=0), covariances[1]
    )


def frechet_distance_of_moments(
    mean_a: Float[np.ndarray, " p"],
    covariance_a: Float[np.ndarray, "p p"],
    mean_b: Float[np.ndarray, " p"],
    covariance_b: Float[np.ndarray, "p p"],
) -> float:
    """Frechet distance between two Gaussians, in float64: FID on pool features, sFID on spatial.

    `|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))` (Heusel et al. 2017, eq. 6).

    With a factor `F F^T = S_a`, of as many columns as `S_a` has rank, `S_a S_b` has the eigenvalues
    of the symmetric `F^T S_b F` and otherwise zeros. That takes symmetric decompositions alone, a
    few times faster than the product's own at 2,048 features; their errors are of float64's
    epsilon however near to singular the covariances are; and where `S_a` is of few images, no
    root is drawn of the rounding errors that its zeros are.
    """
    values, vectors = np.linalg.eigh(np.asarray(covariance_a, np.float64))
    kept = values > len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    factor = vectors[:, kept] * np.sqrt(values[kept])
    eigenvalues = np.linalg.eigvalsh(factor.T @ np.asarray(covariance_b, np.float64) @ factor)
    root_trace = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    difference = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
    traces = np.trace(covariance_a) + np.trace(covariance_b)
    return float(difference @ difference + traces - 2 * root_trace)


@dataclass(frozen=True, eq=False)
class ScoreSums:
    """Running sums of the Inception Score of a known number of images, in float64.

    Images fall into splits by their index, through a fixed permutation of all indices: generated
    images come in order of class, and a split of a tenth of the classes would score a tenth.

    Attributes:
        counts: images seen, by split.
        probabilities: sums of their class probabilities, by split.
        log_probabilities: sums of `sum_c p log p`, by split.
        total: images there will be.
    """

    counts: Int[np.ndarray, " s"]
    probabilities: Float[np.ndarray, "s c"]
    log_probabilities: Float[np.ndarray, " s"]
    total: int

    @classmethod
    def empty(cls, total: int, classes: int, splits: int = SPLITS) -> "ScoreSums":
        """The sums of no image yet.

        Args:
            total: images there will be.
            classes: logits of an image.
            splits: parts of (nearly) equal size that are scored on their own.

        Raises:
            UserError: fewer images than splits.
        """
        if not 1 <= splits <= total:
            raise UserError(
                f"inception score: {total} images for {splits} splits, want one each at least"
            )
        sums = np.zeros((splits, classes)), np.zeros(splits)
        return cls(np.zeros(splits, np.int64), *sums, total)

    def add(self, logits: Real[np.ndarray, "b c"], indices: Int[np.ndarray, " b"]) -> "ScoreSums":
        """The sums with further images.

        Args:
            logits: of every image, natural logarithms up to a constant.
            indices: which of the images they are, `[0, total)`; each image once.
        """
        logs = log_softmax(np.asarray(logits, np.float64), axis=1)
        splits = self._split_of()[indices]
        counts, probabilities = self.counts.copy(), self.probabilities.copy()
        log_probabilities = self.log_probabilities.copy()
        np.add.at(counts, splits, 1)
        np.add.at(probabilities, splits, np.exp(logs))
        np.add.at(log_probabilities, splits, np.sum(np.exp(logs) * logs, axis=1))
        return type(self)(counts, probabilities, log_probabilities, self.total)

    def merge(self, other: "ScoreSums") -> "ScoreSums":
        """The sums of both, where no image is in both."""
        if self.total != other.total:
            raise ValueError(f"sums of {self.total} and of {other.total} images do not merge")
        return type(self)(
            self.counts + other.counts,
            self.probabilities + other.probabilities,
            self.log_probabilities + other.log_probabilities,
            self.total,
        )

    def score(self) -> tuple[float, float]:
        """Inception Score: its mean over the splits, and their standard deviation.

        Of a split, `exp(mean_i KL(p_i | mean_j p_j))` (Salimans et al. 2016).

        Raises:
            ValueError: not every image was added once.
        """
        expected = np.bincount(self._split_of(), minlength=len(self.counts))
        if not np.array_equal(self.counts, expected):
            raise ValueError(f"{self.counts.sum()} images were added, total is {self.total}")
        marginal = self.probabilities / self.counts[:, None]
        # a class that no image has any probability of adds nothing
        logs = np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)
        divergences = self.log_probabilities / self.counts - np.sum(marginal * logs, axis=1)
        scores = np.exp(divergences)
        return float(scores.mean()), float(scores.std())

    def as_arrays(self) -> dict[str, np.ndarray]:
        """The sums by name, for a file."""
        return {
            "counts": self.counts,
            "probabilities": self.probabilities,
            "log_probabilities": self.log_probabilities,
            "total": np.array(self.total),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "ScoreSums":
        """The sums that `as_arrays` named."""
        return cls(
            np.asarray(arrays["counts"]),
            np.asarray(arrays["probabilities"]),
            np.asarray(arrays["log_probabilities"]),
            int(arrays["total"]),
        )

    def _split_of(self) -> Int[np.ndarray, " total"]:
        """The split of every image; numpy never changes what a `RandomState` draws."""
        rank = np.random.RandomState(0).permutation(self.total)
        return rank * len(self.counts) // self.total


def inception_score(logits: Real[np.ndarray, "b c"], splits: int = SPLITS) -> tuple[float, float]:
    """Inception Score of images: its mean over splits, and their standard deviation.

    Args:
        logits: of all images; for the Inception network's, see `Features.logits`.
        splits: see `ScoreSums`.

    Raises:
        UserError: fewer images than splits.
    """
    total, classes = logits.shape
    return ScoreSums.empty(total, classes, splits).add(logits, np.arange(total)).score()
