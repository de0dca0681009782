"""The masked-token head: features to scores over the codebook."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from enat_jax.models.layers import LayerNorm, Linear, product, xavier_uniform

EPSILON = 1e-5  # of the norms after the last block


class Head(nnx.Module):
    """BERT's masked-token head; its output matrix is the embedding's, without its gradient."""

    def __init__(
        self,
        width: int,
        codebook_size: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        kernel_init: nnx.Initializer = xavier_uniform,
    ):
        self.dtype = dtype
        self.norm_in = LayerNorm(width, epsilon=EPSILON)
        self.linear = Linear(width, width, dtype=dtype, rngs=rngs, kernel_init=kernel_init)
        self.norm_out = LayerNorm(width, epsilon=EPSILON)
        self.bias = nnx.Param(jnp.zeros(codebook_size + 1))  # the mask's is never used

    def __call__(
        self, x: Float[Array, "b m d"], word: Float[Array, "w d"]
    ) -> Float[Array, "b m v"]:
        """Logits over the codebook, float32, the mask token's column left out."""
        x = jax.nn.gelu(self.linear(self.norm_in(x)).astype(jnp.float32), approximate=False)
        codes = jax.lax.stop_gradient(word[:-1]).astype(self.dtype)
        logits = product(self.norm_out(x).astype(self.dtype), codes.T)
        return logits + self.bias[...][:-1]
