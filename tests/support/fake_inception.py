"""Small features in place of Inception's, so that a test takes no minute."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from enat_jax.evaluation import objective, statistics
from enat_jax.evaluation.frechet import Gaussian
from enat_jax.evaluation.inception import Features, Inception
from enat_jax.evaluation.statistics import Reference

P, Q, C = 6, 5, 4


class FakeInception(Inception):
    """Random projections of the pixels of images of one size."""

    def __init__(self, side=8):
        shape = (side * side * 3, P + Q + C)
        self.weights = nnx.Param(jax.random.normal(jax.random.key(0), shape))

    def __call__(self, images):
        made = jnp.tanh(images.reshape(len(images), -1) @ self.weights[...] / 4)
        return Features(made[:, :P], made[:, P : P + Q], made[:, P + Q :])


def gaussian(x):
    """What NumPy makes of features."""
    return Gaussian(x.mean(axis=0), np.cov(x, rowvar=False))


def reference(features=True):
    """Statistics of made-up real images."""
    rng = np.random.default_rng(5)
    pool, spatial = rng.normal(size=(30, P)), rng.normal(size=(30, Q))
    single = pool.astype(np.float32) if features else None
    return Reference(gaussian(pool), gaussian(spatial), single)


def use_fake_inception(setattr, side=8):
    """Puts it in the place of the network and of the statistics' file."""
    setattr(objective, "read_reference", lambda path: reference())
    setattr(statistics, "POOL_FEATURES", P)
    setattr(statistics, "SPATIAL_FEATURES", Q)
    for module in (objective, statistics):
        setattr(module, "load_inception", lambda path, digest: FakeInception(side))
