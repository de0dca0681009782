"""Scores computed from features of images."""

import numpy as np
from jaxtyping import Real


def frechet_distance(a: Real[np.ndarray, "b p"], b: Real[np.ndarray, "m p"]) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, in float64.

    `|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))` (Heusel et al. 2017), the trace of the
    root as the sum of the roots of the product's eigenvalues, which are real and not negative.

    Args:
        a: at least two samples.
        b: at least two samples of as many features.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    eigenvalues = np.linalg.eigvals(covariance_a @ covariance_b).real
    root_trace = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    mean_term = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    return float(mean_term + np.trace(covariance_a) + np.trace(covariance_b) - 2 * root_trace)
