"""The reuse projection, which carries features from one step to the next."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from enat_jax.models.block import BLOCK_EPSILON
from enat_jax.models.layers import LayerNorm, Mlp


class ReuseProjection(nnx.Module):
    """`f(z) = z + MLP(LN(z))`, which carries features from one step to the next (section 4.2)."""

    def __init__(self, width: int, mlp_ratio: float, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(width, epsilon=BLOCK_EPSILON)
        self.mlp = Mlp(width, mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        """Projects features of previous tokens."""
        return (features + self.mlp(self.norm(features))).astype(features.dtype)
