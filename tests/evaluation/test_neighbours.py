import numpy as np
import pytest

from enat_jax.errors import UserError
from enat_jax.evaluation.neighbours import precision_recall


def direct(real, generated, k=3):
    """The definition, image by image, in float64."""

    def radius(members, index):
        others = np.delete(members, index, axis=0)
        return np.sort(np.linalg.norm(others - members[index], axis=1))[k - 1]

    def share(members, images):
        radii = np.array([radius(members, index) for index in range(len(members))])
        near = [np.any(np.linalg.norm(members - image, axis=1) <= radii) for image in images]
        return np.mean(near)

    return share(real, generated), share(generated, real)


def two_sets(seed=0, real=90, generated=70, width=12, shift=0.6, spread=0.7):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(real, width)).astype(np.float32),
        (shift + spread * rng.normal(size=(generated, width))).astype(np.float32),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_definition(seed, k):
    real, generated = two_sets(seed)
    precision, recall = precision_recall(real, generated, k=k)
    assert (precision, recall) == pytest.approx(direct(real, generated, k))
    assert 0 <= recall < precision < 1


@pytest.mark.parametrize("at_once", [7, 90])
def test_how_many_are_looked_at_at_once_changes_nothing(at_once):
    real, generated = two_sets()
    assert precision_recall(real, generated, at_once=at_once) == precision_recall(real, generated)


def test_a_set_covers_itself_and_none_far_away():
    real, generated = two_sets(shift=100)
    assert precision_recall(real, real.copy()) == (1.0, 1.0)
    assert precision_recall(real, generated) == (0.0, 0.0)


def test_precision_is_of_the_generated_and_recall_of_the_real():
    """Two real clusters, one of them generated: all that is generated is real, half is covered."""
    rng = np.random.default_rng(0)
    cluster, other = rng.uniform(-1, 1, size=(2, 50, 2))
    real, generated = np.concatenate((cluster, other + 5)), rng.uniform(-0.5, 0.5, size=(40, 2))
    precision, recall = precision_recall(real, generated)
    assert precision == 1
    assert (precision, recall) == pytest.approx(direct(real, generated))
    assert 0 < recall <= 0.5


def test_far_from_zero_the_distances_are_still_right():
    real, generated = two_sets(shift=0.3)
    far = precision_recall(real + np.float32(1000), generated + np.float32(1000))
    assert far == pytest.approx(
        direct(real.astype(np.float64) + 1000, generated + 1000.0), abs=0.03
    )
    assert far == pytest.approx(precision_recall(real, generated), abs=0.03)


def test_images_that_are_there_k_more_times_are_near_their_copies_alone():
    """Their radius is 0, and rounding must not keep their equals out of it."""
    rng = np.random.default_rng(0)
    width = 2048
    real = np.repeat(rng.gamma(0.5, size=(5, width)), 4, axis=0).astype(np.float32)
    generated = np.concatenate((real[::4], real[:1] + np.float32(0.02), real[:5]))
    assert precision_recall(real, generated, at_once=3)[0] == pytest.approx(10 / 11)


@pytest.mark.parametrize("seed", range(2))
def test_products_of_other_shapes_are_rounded_alike(seed):
    """The last image is multiplied alone, its copies' radii are of products of 20."""
    rng = np.random.default_rng(seed)
    real = np.repeat(rng.gamma(0.5, size=(5, 2048)), 4, axis=0).astype(np.float32)
    generated = np.concatenate((real, real[:1]))
    assert precision_recall(real, generated, at_once=20) == (1.0, 1.0)


def test_with_a_copy_too_few_the_radius_reaches_the_next_image():
    real = np.array([[0.0], [0.0], [0.0], [5.0], [6.0], [7.0], [8.0]], np.float32)
    generated = np.array([[-4.9], [-5.1], [3.0], [4.0]], np.float32)
    assert precision_recall(real, generated) == pytest.approx(direct(real, generated))
    assert precision_recall(real, generated)[0] == 0.75


@pytest.mark.parametrize(("real", "generated"), [(3, 10), (10, 3), (0, 0)])
def test_too_few_images_are_refused(real, generated):
    with pytest.raises(UserError) as caught:
        precision_recall(np.zeros((real, 2)), np.zeros((generated, 2)))
    assert str(caught.value) == (
        "precision and recall with k = 3 need at least 4 real and generated images,"
        f" got {real} and {generated}"
    )


def test_one_image_more_than_k_is_enough():
    real, generated = two_sets(real=4, generated=4)
    assert precision_recall(real, generated) == pytest.approx(direct(real, generated))


def test_half_precision_features_are_taken():
    real, generated = (x.astype(np.float16) for x in two_sets())
    expected = precision_recall(real.astype(np.float32), generated.astype(np.float32))
    assert precision_recall(real, generated) == expected
