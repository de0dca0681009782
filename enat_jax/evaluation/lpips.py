"""LPIPS, a perceptual distance between images: weighted differences of VGG16's features."""

import itertools

import jax
import jax.numpy as jnp
from einops import reduce
from flax import nnx
from jaxtyping import Array, Float

from enat_jax.tokenizers.vqgan import Conv

# channels of the convolutions of each stage; a pool halves the resolution between stages
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

# of images in [-1, 1], per channel; makes of them what VGG16 was trained on
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10  # added to the length of a feature vector


class LPIPS(nnx.Module):
    """LPIPS with VGG16 features, version 0.1 (Zhang et al. 2018, equation 1).

    The features are those after the last rectifier of each of VGG16's five stages.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        dtype = jnp.dtype("float32")
        widths = [3, *(width for stage in STAGES for width in stage)]
        convs = iter(
            Conv(i, o, 3, bias=True, dtype=dtype, rngs=rngs) for i, o in itertools.pairwise(widths)
        )
        self.stages = nnx.List(nnx.List(next(convs) for _ in stage) for stage in STAGES)
        self.weights = nnx.List(nnx.Param(jnp.ones(stage[-1])) for stage in STAGES)

    def features(self, images: Float[Array, "b y x 3"]) -> list[Float[Array, "b _ _ _"]]:
        """Feature vectors of length 1 at every place of each stage, for images in [0, 1]."""
        x = (2 * images - 1 - jnp.array(_SHIFT)) / jnp.array(_SCALE)
        vectors = []
        for number, stage in enumerate(self.stages):
            if number:
                y, u = (side // 2 * 2 for side in x.shape[1:3])  # an odd row or column is dropped
                x = reduce(x[:, :y, :u], "b (y j) (x i) c -> b y x c", "max", j=2, i=2)
            for conv in stage:
                x = jax.nn.relu(conv(x))
            squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
            # No root where the squares are, or underflow to, 0: its slope there is infinite.
            length = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
            vectors.append(x / (length + _EPSILON))
        return vectors

    def __call__(
        self, images: Float[Array, "b y x 3"], others: Float[Array, "b y x 3"]
    ) -> Float[Array, " b"]:
        """Distances between images in [0, 1] of at least 16 pixels a side."""
        total = jnp.zeros(len(images))
        pairs = zip(self.features(images), self.features(others), self.weights, strict=True)
        for a, b, weights in pairs:
            difference = jnp.einsum("byxc,c->byx", jnp.square(a - b), weights[...])
            total += jnp.mean(difference, axis=(1, 2))
        return total
