"""The Frechet distance between the features of two sets of images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Real

from enat_jax.errors import UserError
from enat_jax.evaluation.metric import Metric


class Gaussian(NamedTuple):
    """The mean and the covariance of features."""

    mean: Real[np.ndarray, " p"]
    covariance: Real[np.ndarray, "p p"]


class Moments(NamedTuple):
    """Running moments of features, in float64: those of a single pass, in whatever batches.

    Attributes:
        count: samples seen.
        mean: of every feature.
        scatter: sum of outer products of the samples' deviations from the mean.
    """

    count: int | np.ndarray
    mean: Float[np.ndarray, " p"]
    scatter: Float[np.ndarray, "p p"]

    @classmethod
    def empty(cls, features: int) -> "Moments":
        """The moments of no sample yet."""
        return cls(0, np.zeros(features), np.zeros((features, features)))

    def add(self, features: Real[np.ndarray, "b p"]) -> "Moments":
        """The moments with further samples (Chan, Golub and LeVeque 1979).

        Every call passes over the whole scatter, so batches of some hundreds are quickest.

        Raises:
            UserError: a feature that is infinite or not a number.
        """
        rows = features.astype(np.float64)
        if wrong := np.sum(~np.isfinite(rows).all(axis=1)):
            raise UserError(f"features of {wrong} of {len(rows)} images are infinite or NaN")
        if not len(rows):
            return self
        count = self.count + len(rows)
        difference = rows.mean(axis=0) - self.mean
        mean = self.mean + difference * (len(rows) / count)
        rows -= rows.mean(axis=0)
        scatter = np.outer(difference, difference * (self.count * len(rows) / count))
        scatter += self.scatter
        scatter += rows.T @ rows
        return Moments(count, mean, scatter)

    def gaussian(self) -> Gaussian:
        """Mean and covariance, over `count - 1` as FID's reference statistics have it.

        Raises:
            UserError: fewer than two samples.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Frechet distance between two Gaussians, in float64.

    `|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))` (Heusel et al. 2017, eq. 6).

    With a factor `F F^T = S_a`, of as many columns as `S_a` has rank, `S_a S_b` has the eigenvalues
    of the symmetric `F^T S_b F` and otherwise zeros. That takes symmetric decompositions alone, a
    few times faster than the product's own at 2,048 features; their errors are of float64's
    epsilon however near to singular the covariances are; and where `S_a` is of few images, no
    root is drawn of the rounding errors that its zeros are.
    """
    mean_a, covariance_a, mean_b, covariance_b = (np.asarray(x, np.float64) for x in (*a, *b))
    values, vectors = np.linalg.eigh(covariance_a)
    kept = values > len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    factor = vectors[:, kept] * np.sqrt(values[kept])
    eigenvalues = np.linalg.eigvalsh(factor.T @ covariance_b @ factor)
    root_trace = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    difference = mean_a - mean_b
    traces = np.trace(covariance_a) + np.trace(covariance_b)
    return float(difference @ difference + traces - 2 * root_trace)


def frechet(
    name: str, real: Gaussian, features: Callable[[Any], np.ndarray] = lambda seen: seen
) -> Metric:
    """The metric of the distance to real images: FID, on Inception's pool features.

    `features` takes those, `[b p]`, from what is seen of images; that itself by default.
    """
    return Metric(
        names=(name,),
        empty=lambda: Moments.empty(len(real.mean)),
        add=lambda sums, seen, class_ids: sums.add(features(seen)),
        value=lambda sums: {name: frechet_distance(sums.gaussian(), real)},
    )
