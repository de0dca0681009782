import numpy as np
import pytest
import scipy.linalg

from enat_jax.errors import UserError
from enat_jax.evaluation.frechet import Gaussian, Moments, frechet_distance

EXACT = 1e-10


def features(seed=0, count=100, width=7):
    """Correlated features, far from zero: sums of squares would lose six digits of them."""
    rng = np.random.default_rng(seed)
    return (1000 + rng.normal(size=(count, width)) @ rng.normal(size=(width, width))).astype(
        np.float32
    )


def assert_moments_of(moments, x):
    x = x.astype(np.float64)
    assert moments.count == len(x)
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=EXACT)
    covariance = np.cov(x, rowvar=False)
    limit = EXACT * np.abs(covariance).max()
    np.testing.assert_allclose(moments.gaussian().covariance, covariance, rtol=0, atol=limit)


def streamed(x, sizes):
    moments = Moments.empty(x.shape[1])
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        moments = moments.add(part)
    return moments


class TestMoments:
    @pytest.mark.parametrize(
        "sizes", [(5, 1, 40, 0, 54), (100,), (1,) * 100, (33, 33, 34)], ids=lambda s: str(len(s))
    )
    def test_uneven_batches_give_the_moments_of_all(self, sizes):
        x = features()
        assert sum(sizes) == len(x)
        assert_moments_of(streamed(x, sizes), x)

    def test_adding_changes_neither_moments_nor_features(self):
        x = features().astype(np.float64)
        kept = x.copy()
        before = streamed(x[:50], [50])
        before.add(x[50:])
        assert_moments_of(before, x[:50])
        np.testing.assert_array_equal(x, kept)

    def test_a_covariance_needs_two_images(self):
        with pytest.raises(UserError, match="at least 2 images, got 1"):
            Moments.empty(7).add(features(count=1)).gaussian()

    @pytest.mark.parametrize("wrong", [np.nan, np.inf])
    def test_features_that_are_no_numbers_are_refused(self, wrong):
        x = features()
        x[3, 2] = x[3, 4] = x[70, 0] = wrong
        with pytest.raises(UserError, match="features of 2 of 100 images are infinite or NaN"):
            Moments.empty(7).add(x)


def samples(seed, count=200, width=6):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(
        size=width
    )


def gaussian(x):
    return Gaussian(x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False)))


def distance(a, b):
    return frechet_distance(gaussian(a), gaussian(b))


class TestDistance:
    @pytest.mark.parametrize("seed", range(3))
    def test_it_is_the_formula_with_a_matrix_root(self, seed):
        a, b = samples(2 * seed), samples(2 * seed + 1, count=300)
        covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        mean_term = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
        expected = mean_term + np.trace(covariances[0] + covariances[1] - 2 * root)
        assert distance(a, b) == pytest.approx(expected, rel=1e-6)
        assert distance(b, a) == pytest.approx(expected, rel=1e-6)

    def test_a_set_is_at_distance_0_from_itself_and_a_shift_costs_its_squared_length(self):
        a = samples(0)
        shift = np.array([1.0, -2.0, 0, 0, 0.5, 0])
        assert distance(a, a[::-1]) == pytest.approx(0, abs=1e-8)
        assert distance(a, a + shift) == pytest.approx(shift @ shift)

    def test_a_single_feature_has_the_closed_form(self):
        a, b = samples(0)[:, :1], samples(1)[:, :1]
        difference = np.mean(a) - np.mean(b), np.std(a, ddof=1) - np.std(b, ddof=1)
        assert distance(a, b) == pytest.approx(sum(x**2 for x in difference))

    def test_features_that_never_vary_are_no_obstacle(self):
        a, b = samples(0), samples(1)
        a[:, 2] = b[:, 2] = 4.0
        others = [0, 1, 3, 4, 5]
        assert distance(a, b) == pytest.approx(distance(a[:, others], b[:, others]), rel=1e-6)
        zeros = np.zeros((5, 3))
        assert distance(zeros, zeros + 2) == 12.0

    @pytest.mark.parametrize("rank", [(20, 12), (12, 20), (20, 40), (40, 40)])
    def test_singular_gaussians_have_the_closed_form(self, rank):
        """Covariances of common axes, each flat along some of them."""
        rng = np.random.default_rng(0)
        axes = np.linalg.qr(rng.normal(size=(40, 40)))[0]
        deviations = [np.where(np.arange(40) < r, rng.uniform(1, 2, size=40), 0) for r in rank]
        a, b = (Gaussian(np.zeros(40), (axes * deviation**2) @ axes.T) for deviation in deviations)
        expected = np.sum((deviations[0] - deviations[1]) ** 2)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)

    def test_too_few_samples_are_still_at_distance_0_from_themselves(self):
        """Where roots of rounding errors would add up to a distance."""
        few = samples(0, count=20, width=300)
        scale = np.trace(np.cov(few, rowvar=False))
        assert abs(distance(few, few)) < 1e-12 * scale


class TestRecordedDistances:
    """The reference's moments are float32, so its own distance is less exact than SciPy's of it."""

    @pytest.fixture
    def recorded(self, golden):
        return golden("inception/fid.npz")

    @pytest.fixture
    def real(self, recorded):
        return Gaussian(recorded["mu_ref"], recorded["sigma_ref"])

    def test_it_is_scipys_with_the_root_of_the_product(self, recorded, real):
        ours = frechet_distance(Gaussian(recorded["m1"], recorded["s1"]), real)
        assert ours == pytest.approx(recorded["fid_scipy_sqrtm"], rel=1e-9)

    def test_from_features_it_is_the_references(self, recorded, real):
        ours = frechet_distance(Moments.empty(48).add(recorded["features"]).gaussian(), real)
        assert ours == pytest.approx(recorded["fid_scipy_sqrtm"], rel=1e-6)
        assert ours == pytest.approx(recorded["fid"], rel=1e-3)

    def test_of_30_images_in_48_features_it_is_the_references(self, recorded, real):
        few = Moments.empty(48).add(recorded["features"][:30]).gaussian()
        assert np.linalg.matrix_rank(few.covariance) == 29
        assert frechet_distance(few, real) == pytest.approx(recorded["fid_first30"], rel=1e-3)
