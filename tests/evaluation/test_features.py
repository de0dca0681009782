import jax
import numpy as np
import pytest

from enat_jax.evaluation.features import FeatureExtractor
from enat_jax.evaluation.inception import Features, Inception
from enat_jax.parallel.placement import MeshConfig, Placement


class Means(Inception):
    """The means of channels in place of Inception's features."""

    def __init__(self):
        pass

    def __call__(self, images):
        means = images.mean(axis=(1, 2))
        return Features(means, 2 * means, 3 * means)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("at_once", [1, 4, 6, 100])
def test_how_many_are_looked_at_at_a_time_changes_nothing(images, at_once):
    placement = Placement.of(MeshConfig())
    placed = jax.device_put(images, placement.batch)
    found = FeatureExtractor(Means(), placement, at_once=at_once)(placed)
    np.testing.assert_allclose(found.pool, images.mean(axis=(1, 2)) / 255, rtol=1e-5)
    np.testing.assert_allclose(found.logits, 3 * found.pool, rtol=1e-6)


def test_levels_and_floats_of_the_same_images_have_the_same_features(images):
    placement = Placement.of(MeshConfig())
    extract = FeatureExtractor(Means(), placement)
    floats = jax.device_put((images / 255).astype(np.float32), placement.batch)
    levels = jax.device_put(images, placement.batch)
    np.testing.assert_allclose(extract(floats).pool, extract(levels).pool, rtol=1e-6)
