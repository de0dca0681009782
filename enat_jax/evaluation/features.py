"""Inception features of batches of images that lie on a mesh of devices."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Shaped

from enat_jax.evaluation.inception import Features, Inception
from enat_jax.parallel.placement import Placement


class FeatureExtractor:
    """Compiled once for each size and type of images.

    Args:
        inception: the network.
        placement: of the devices that share a batch.
        at_once: images that a device looks at at a time.
    """

    def __init__(self, inception: Inception, placement: Placement, *, at_once: int = 16):
        graphdef, state = nnx.split(inception)
        self._state = placement.put(state)

        def features(state: nnx.State, images: Shaped[Array, "b y x 3"]) -> Features:
            network = nnx.merge(graphdef, state)

            def some(part: Array) -> Features:
                floats = part / jnp.float32(255) if part.dtype == jnp.uint8 else part
                return network(floats)

            return placement.map_in_chunks(some, images, at_once)

        self._features = jax.jit(features, out_shardings=placement.batch)

    def __call__(self, images: Shaped[Array, "b y x 3"]) -> Features:
        """Features of images, uint8 or floats in [0, 1]; both lie split over the mesh by image."""
        return self._features(self._state, images)
