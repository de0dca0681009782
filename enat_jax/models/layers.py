"""The small layers every network is made of: linear, normalisation, MLP, embeddings, head."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree

xavier_uniform = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros_init()
EMBEDDING_STD = 0.02
HEAD_EPSILON = 1e-5  # of the norms after the last block
LINEAR = "linear"  # what the outputs of linear layers are called where remat chooses what to keep


@dataclass(frozen=True)
class Unplaced:
    """Leaves arrays where they are: what a model and a step have instead of a `Placement`."""

    def weights(self, params: PyTree) -> PyTree:
        """Parameters as they lie within a step."""
        return params

    def block(self, block: Any) -> Any:
        """A block of a stack where it is used."""
        return block

    def gradients(self, grads: PyTree) -> PyTree:
        """Gradients of all parameters."""
        return grads

    def activations(self, x: Array, how: Literal["rows", "columns", "whole"]) -> Array:
        """Activations: split by images; or as adaLN's layers need them."""
        return x


UNPLACED = Unplaced()


@jax.custom_vjp
def product(x: Float[Array, "*b i"], kernel: Float[Array, "*k"]) -> Float[Array, "*c"]:
    """Contracts the last axis of `x` with the first of `kernel`; sums in float32, returns it.

    Its gradients are products of the operands' type as well: derived by JAX they would mix
    float32 with bfloat16, which GPUs compute at float32's speed.
    """
    return _contract(x, kernel, 1).astype(jnp.float32)


def _contract(a: Array, b: Array, axes: Any) -> Array:
    """A product of 16-bit operands, as quick as the platform can.

    All sum in float32. On CPU a product with a 16-bit result is slower than one of float32.
    Elsewhere the result is rounded at once, so that what several devices have of it goes over
    their links in 16 bits.
    """

    def wide(a: Array, b: Array) -> Array:
        return jnp.tensordot(a, b, axes=axes, preferred_element_type=jnp.float32)

    def narrow(a: Array, b: Array) -> Array:
        return jnp.tensordot(a, b, axes=axes, preferred_element_type=a.dtype).astype(jnp.float32)

    if a.dtype == jnp.float32:
        return wide(a, b)
    return jax.lax.platform_dependent(a, b, cpu=wide, default=narrow)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel), (x, kernel)


def _product_backward(operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = operands
    out, batch = kernel.ndim - 1, x.ndim - 1
    of_x = (tuple(range(g.ndim - out, g.ndim)), tuple(range(1, kernel.ndim)))
    of_kernel = (tuple(range(batch)), tuple(range(batch)))
    g = g.astype(x.dtype)
    to_x, to_kernel = _contract(g, kernel, of_x), _contract(x, g, of_kernel)
    return to_x.astype(x.dtype), to_kernel.astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)


class Linear(nnx.Module):
    """`x @ kernel + bias`, operands in `dtype`, accumulated in float32, returned in `dtype`.

    Args:
        features_in: length of the last axis.
        features_out: of the axis that takes its place, or of several axes: devices can split the
            last one.
        dtype: of operands and result.
        rngs: keys of the initialisation.
        kernel_init: of the kernel as a matrix.
        use_bias: whether to add one.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int | tuple[int, ...],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        kernel_init: nnx.Initializer = xavier_uniform,
        use_bias: bool = True,
    ):
        self.dtype = dtype
        out = (features_out,) if isinstance(features_out, int) else features_out
        kernel = kernel_init(rngs.params(), (features_in, math.prod(out)))
        self.kernel = nnx.Param(kernel.reshape(features_in, *out))
        self.bias = nnx.Param(jnp.zeros(out)) if use_bias else None

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*c"]:
        """Applies the layer to the last axis."""
        y = product(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        if self.bias is not None:
            y = y + self.bias[...]
        return checkpoint_name(y.astype(self.dtype), LINEAR)


def cast_kernels(params: PyTree, dtype: jnp.dtype) -> PyTree:
    """Parameters with the kernels in the operands' type: cast once, not at every use."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(dtype) if "kernel" in jax.tree_util.keystr(path) else x, params
    )


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
    """Two linear layers with a GELU between them, ENAT's with the tanh approximation."""

    def __init__(
        self,
        width: int,
        mlp_ratio: float,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        kernel_init: nnx.Initializer = xavier_uniform,
        approximate: bool = True,
    ):
        hidden = int(width * mlp_ratio)
        self.approximate = approximate
        self.up = Linear(width, hidden, dtype=dtype, rngs=rngs, kernel_init=kernel_init)
        self.down = Linear(hidden, width, dtype=dtype, rngs=rngs, kernel_init=kernel_init)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Applies the MLP to the last axis."""
        return self.down(jax.nn.gelu(self.up(x), approximate=self.approximate))


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
        self.norm_in = LayerNorm(width, epsilon=HEAD_EPSILON)
        self.linear = Linear(width, width, dtype=dtype, rngs=rngs, kernel_init=kernel_init)
        self.norm_out = LayerNorm(width, epsilon=HEAD_EPSILON)
        self.bias = nnx.Param(jnp.zeros(codebook_size + 1))  # the mask's is never used

    def __call__(
        self, x: Float[Array, "b m d"], word: Float[Array, "w d"]
    ) -> Float[Array, "b m v"]:
        """Logits over the codebook, float32, the mask token's column left out."""
        x = jax.nn.gelu(self.linear(self.norm_in(x)).astype(jnp.float32), approximate=False)
        codes = jax.lax.stop_gradient(word[:-1]).astype(self.dtype)
        logits = product(self.norm_out(x).astype(self.dtype), codes.T)
        return logits + self.bias[...][:-1]
