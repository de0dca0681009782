import numpy as np
import pytest
import scipy.linalg

from enat_jax.metrics.scores import frechet_distance


def samples(seed, count=200, features=6):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(features, features))
    return rng.normal(size=(count, features)) @ mixing + rng.normal(size=features)


def with_moments(mean, covariance, count=50):
    """Samples whose mean and covariance are exactly the given ones."""
    z = np.random.default_rng(0).normal(size=(count, len(mean)))
    z -= z.mean(axis=0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z, rowvar=False))).T
    return z @ np.linalg.cholesky(covariance).T + mean


def test_a_set_is_at_distance_0_from_itself_and_from_itself_in_another_order():
    a = samples(0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-8)


def test_a_shift_costs_its_squared_length():
    a = samples(0)
    shift = np.array([1.0, -2.0, 0, 0, 0.5, 0])
    assert frechet_distance(a, a + shift) == pytest.approx(shift @ shift)


def test_uncorrelated_gaussians_have_the_closed_form():
    mean_a, mean_b = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 5.0])
    std_a, std_b = np.array([1.0, 2.0, 0.5]), np.array([2.0, 2.0, 1.0])
    a, b = with_moments(mean_a, np.diag(std_a**2)), with_moments(mean_b, np.diag(std_b**2))
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((std_a - std_b) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_formula_with_a_matrix_root(seed):
    a, b = samples(2 * seed), samples(2 * seed + 1, count=300)
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    mean_term = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    expected = mean_term + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_it_is_symmetric():
    a, b = samples(0), samples(1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, b) > 1


def test_features_that_never_vary_are_no_obstacle():
    a, b = samples(0), samples(1)
    a[:, 2] = b[:, 2] = 4.0
    others = [0, 1, 3, 4, 5]
    expected = frechet_distance(a[:, others], b[:, others])
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_fewer_samples_than_features_are_no_obstacle():
    a, b = samples(0, count=4), samples(1, count=4)
    distance = frechet_distance(a, b)
    assert np.isfinite(distance)
    assert distance >= np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)


def test_whole_numbers_are_taken_as_they_are():
    rng = np.random.default_rng(0)
    a, b = rng.integers(256, size=(2, 100, 3), dtype=np.uint8)
    assert frechet_distance(a, b) == frechet_distance(a.astype(np.float64), b.astype(np.float64))
