import numpy as np
import pytest
import scipy.linalg
import scipy.special

from enat_jax.errors import UserError
from enat_jax.evaluation.scores import (
    ScoreSums,
    frechet_distance,
    frechet_distance_of_moments,
    inception_score,
)


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


@pytest.fixture
def recorded(golden):
    return golden("inception/fid.npz")


class TestRecordedDistances:
    """The reference's moments are float32, so its own distance is less exact than SciPy's of it."""

    def test_it_is_scipys_with_the_root_of_the_product(self, recorded):
        ours = frechet_distance_of_moments(
            recorded["m1"], recorded["s1"], recorded["mu_ref"], recorded["sigma_ref"]
        )
        assert ours == pytest.approx(recorded["fid_scipy_sqrtm"], rel=1e-9)

    def test_from_features_it_is_the_references(self, recorded):
        features = recorded["features"].astype(np.float64)
        ours = frechet_distance_of_moments(
            features.mean(axis=0),
            np.cov(features, rowvar=False),
            recorded["mu_ref"],
            recorded["sigma_ref"],
        )
        assert ours == pytest.approx(recorded["fid_scipy_sqrtm"], rel=1e-6)
        assert ours == pytest.approx(recorded["fid"], rel=1e-3)

    def test_of_30_images_in_48_features_it_is_the_references(self, recorded):
        few = recorded["features"][:30].astype(np.float64)
        covariance = np.cov(few, rowvar=False)
        assert np.linalg.matrix_rank(covariance) == 29
        ours = frechet_distance_of_moments(
            few.mean(axis=0), covariance, recorded["mu_ref"], recorded["sigma_ref"]
        )
        assert ours == pytest.approx(recorded["fid_first30"], rel=1e-3)


@pytest.mark.parametrize("rank", [(20, 12), (12, 20), (20, 40), (40, 40)])
def test_singular_gaussians_have_the_closed_form(rank):
    """Covariances of common axes, each flat along some of them."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    deviations = [np.where(np.arange(40) < r, rng.uniform(1, 2, size=40), 0) for r in rank]
    covariances = [(axes * deviation**2) @ axes.T for deviation in deviations]
    mean = np.zeros(40)
    distance = frechet_distance_of_moments(mean, covariances[0], mean, covariances[1])
    expected = np.sum((deviations[0] - deviations[1]) ** 2)
    assert distance == pytest.approx(expected, rel=1e-7)


def test_too_few_samples_are_still_at_distance_0_from_themselves():
    """Where roots of rounding errors would add up to a distance."""
    few = samples(0, count=20, features=300)
    scale = np.trace(np.cov(few, rowvar=False))
    assert abs(frechet_distance(few, few)) < 1e-12 * scale


def test_features_that_are_all_constant_are_no_obstacle():
    zeros = np.zeros((5, 3))
    assert frechet_distance(zeros, zeros + 2) == 12.0


def test_a_single_feature_has_the_closed_form():
    a, b = samples(0)[:, :1], samples(1)[:, :1]
    difference = np.mean(a) - np.mean(b), np.std(a, ddof=1) - np.std(b, ddof=1)
    assert frechet_distance(a, b) == pytest.approx(sum(x**2 for x in difference))


def classes_of(count, classes=20, seed=0):
    """Logits that are certain of one class each, in order of class."""
    return 1000.0 * np.eye(classes)[np.arange(count) * classes // count]


class TestInceptionScore:
    def test_of_uniform_logits_it_is_1(self):
        assert inception_score(np.full((50, 1008), 3.0)) == pytest.approx((1, 0))

    def test_of_images_all_alike_it_is_1(self):
        logits = np.random.default_rng(0).normal(size=(1, 30))
        assert inception_score(np.repeat(logits, 50, axis=0)) == pytest.approx((1, 0))

    def test_of_certain_and_balanced_classes_it_is_their_number(self):
        assert inception_score(classes_of(400), splits=1) == pytest.approx((20, 0))

    def test_images_in_order_of_class_are_spread_over_the_splits(self):
        mean, spread = inception_score(classes_of(4000))
        assert 19 < mean < 20
        assert 0 < spread < 0.5

    def test_it_is_the_formula_for_every_split(self):
        logits = 3 * np.random.default_rng(0).normal(size=(103, 6))
        scores = []
        splits = np.random.RandomState(0).permutation(103) * 10 // 103
        assert set(np.bincount(splits)) == {10, 11}
        for split in range(10):
            p = scipy.special.softmax(logits[splits == split], axis=1)
            divergence = scipy.special.rel_entr(p, p.mean(axis=0)).sum(axis=1)
            scores.append(np.exp(divergence.mean()))
        assert inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)))

    def test_logits_count_up_to_a_constant(self):
        logits = np.random.default_rng(0).normal(size=(50, 6))
        assert inception_score(logits + 5000) == pytest.approx(inception_score(logits))

    def test_fewer_images_than_splits_are_refused(self):
        with pytest.raises(UserError, match="9 images for 10 splits, want one each at least"):
            inception_score(np.zeros((9, 5)))


class TestScoreSums:
    @pytest.fixture
    def logits(self):
        return 3 * np.random.default_rng(1).normal(size=(103, 6)).astype(np.float32)

    @staticmethod
    def summed(logits, *parts):
        sums = ScoreSums.empty(103, 6)
        for part in parts:
            sums = sums.add(logits[part], part)
        return sums

    def test_in_any_batches_and_order_they_give_the_score_of_the_whole(self, logits):
        order = np.random.default_rng(0).permutation(103)
        sums = self.summed(logits, *np.split(order, [1, 1, 40, 90]))
        assert sums.score() == pytest.approx(inception_score(logits), rel=1e-12)

    def test_merged_and_from_a_file_they_are_the_same(self, logits, tmp_path):
        halves = self.summed(logits, np.arange(50)), self.summed(logits, np.arange(50, 103))
        np.savez(tmp_path / "half.npz", **halves[0].as_arrays())
        merged = ScoreSums.from_arrays(np.load(tmp_path / "half.npz")).merge(halves[1])
        assert merged.score() == pytest.approx(inception_score(logits), rel=1e-12)

    def test_sums_of_different_totals_do_not_merge(self):
        with pytest.raises(ValueError, match="of 103 and of 104 images do not merge"):
            ScoreSums.empty(103, 6).merge(ScoreSums.empty(104, 6))

    def test_a_score_needs_every_image_once(self, logits):
        with pytest.raises(ValueError, match="100 images were added, total is 103"):
            self.summed(logits, np.arange(100)).score()
        with pytest.raises(ValueError, match="103 images were added, total is 103"):
            self.summed(logits, np.arange(100), np.arange(3)).score()
