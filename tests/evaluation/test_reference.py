import numpy as np
import pytest

from enat_jax.evaluation.moments import Moments
from enat_jax.evaluation.reference import ReferenceError, read_reference, write_reference

P, Q = 2048, 2023


def written(tmp_path, **arrays):
    path = tmp_path / "statistics.npz"
    np.savez(path, **arrays)
    return path


def refusal(path):
    with pytest.raises(ReferenceError) as caught:
        read_reference(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read(tmp_path):
    rng = np.random.default_rng(0)
    pool, spatial = rng.normal(size=(5, P)), rng.normal(size=(5, Q))
    features = pool.astype(np.float32)
    write_reference(
        tmp_path / "s.npz", Moments.empty(P).add(pool), Moments.empty(Q).add(spatial), features
    )
    found = read_reference(tmp_path / "s.npz")
    np.testing.assert_allclose(found.mean, pool.mean(axis=0), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(pool, rowvar=False), atol=1e-12)
    np.testing.assert_allclose(found.spatial_mean, spatial.mean(axis=0), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found.spatial_covariance, np.cov(spatial, rowvar=False), atol=1e-12)
    np.testing.assert_array_equal(found.features, features)
    assert found.images == 5


def test_a_file_of_mu_and_sigma_alone_is_enough(tmp_path):
    mu, sigma = np.zeros(P, np.float32), np.eye(P, dtype=np.float32)
    found = read_reference(written(tmp_path, mu=mu, sigma=sigma))
    assert found.mean.dtype == found.covariance.dtype == np.float64
    assert found.spatial_mean is found.features is found.images is None


def test_other_arrays_in_the_file_are_left_alone(tmp_path):
    found = read_reference(
        written(tmp_path, mu=np.zeros(P), sigma=np.eye(P), arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    )
    assert found.features is None


class TestRefusals:
    def test_statistics_of_the_wrong_size_are_named_with_the_right_one(self, tmp_path):
        message = refusal(written(tmp_path, mu=np.zeros(768), sigma=np.eye(768)))
        assert "mu is (768,), must be (2048,)" in message
        assert "sigma is (768, 768), must be (2048, 2048)" in message

    def test_a_missing_array_is_named_beside_those_that_are_there(self, tmp_path):
        message = refusal(written(tmp_path, mu=np.zeros(P), s=np.eye(2)))
        assert "no sigma among ['mu', 's']" in message

    def test_values_that_are_not_finite_are_named(self, tmp_path):
        mu = np.zeros(P)
        mu[3] = np.nan
        assert "mu has values that are not finite" in refusal(
            written(tmp_path, mu=mu, sigma=np.eye(P))
        )

    def test_a_missing_file_is_one_line(self, tmp_path):
        assert "No such file" in refusal(tmp_path / "none.npz")

    def test_a_truncated_file_is_one_line(self, tmp_path):
        path = written(tmp_path, mu=np.zeros(P), sigma=np.eye(P))
        path.write_bytes(path.read_bytes()[:5000])
        assert "cannot read reference statistics" in refusal(path)
