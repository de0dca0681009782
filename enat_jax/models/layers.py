"""The small layers every network is made of: linear, normalisation, MLP, embeddings."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

xavier_uniform = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros_init()
EMBEDDING_STD = 0.02


class Linear(nnx.Module):
    """`x @ kernel + bias`, operands in `dtype`, accumulated in float32, returned in `dtype`.

    The float32 accumulation is asked for explicitly, because on CPU a bfloat16 product with a
    bfloat16 result is slower than float32, and on accelerators asking costs nothing.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        kernel_init: nnx.Initializer = xavier_uniform,
    ):
        self.dtype = dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (features_in, features_out)))
        self.bias = nnx.Param(jnp.zeros(features_out))

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """Applies the layer to the last axis."""
        y = jnp.matmul(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return (y + self.bias[...]).astype(self.dtype)


def layer_norm(x: Float[Array, "*b d"], *, epsilon: float) -> Float[Array, "*b d"]:
    """Normalises the last axis to mean 0 and variance 1, in float32."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centred = x - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon)


class LayerNorm(nnx.Module):
    """Layer normalisation with a learned scale and bias, in float32."""

    def __init__(self, features: int, *, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalises the last axis, then scales and shifts it."""
        return layer_norm(x, epsilon=self.epsilon) * self.scale[...] + self.bias[...]


class Mlp(nnx.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, width: int, mlp_ratio: float, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        hidden = int(width * mlp_ratio)
        self.up = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Applies the MLP to the last axis."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class TokenEmbedding(nnx.Module):
    """Word plus learned position embedding, normalised (BERT's, with epsilon 1e-6)."""

    def __init__(self, vocabulary: int, length: int, width: int, *, rngs: nnx.Rngs):
        key = rngs.params
        self.word = nnx.Param(EMBEDDING_STD * jax.random.normal(key(), (vocabulary, width)))
        self.position = nnx.Param(EMBEDDING_STD * jax.random.normal(key(), (length, width)))
        self.norm = LayerNorm(width, epsilon=1e-6)

    def __call__(
        self, token_ids: Int[Array, "b n"] | int, positions: Int[Array, "b n"]
    ) -> Float[Array, "b n d"]:
        """Embeds tokens at their positions; a single id (the mask's) is the same everywhere."""
        return self.norm(self.word[...][token_ids] + self.position[...][positions])


def dropout(x: Float[Array, "*b d"], rate: float, key: jax.Array | None) -> Float[Array, "*b d"]:
    """Zeroes elements with probability `rate` and scales the rest; `key=None` is evaluation."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)
