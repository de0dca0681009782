"""The Transformer block: SC-attention and an MLP under adaLN, on rows that pack images."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from enat_jax.models.attention import Implementation, SelfCrossAttention
from enat_jax.models.layers import Linear, Mlp, layer_norm, zeros

BLOCK_EPSILON = 1e-6  # of the norms inside blocks and of those that feed them


class Block(nnx.Module):
    """SC-attention and an MLP, both modulated by the class through adaLN with eight vectors."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        dtype: jnp.dtype,
        attention: Implementation,
        rngs: nnx.Rngs,
    ):
        self.attention = SelfCrossAttention(
            width, num_heads, dtype=dtype, implementation=attention, rngs=rngs
        )
        self.mlp = Mlp(width, mlp_ratio, dtype=dtype, rngs=rngs)
        # zero: every block starts as the identity
        self.modulation = Linear(width, 8 * width, dtype=dtype, kernel_init=zeros, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b m d"] | None,
        modulation: Float[Array, "b g r"],
        *,
        own_counts: Sequence[int],
        context_blocks: Sequence[Sequence[int]] = (),
        valid: Bool[Array, " k"] | None = None,
    ) -> Float[Array, "b n d"]:
        """Updates own tokens; `context` is already normalised, for it is the same in all blocks."""
        own_part, context_part = _by_reader(modulation)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(
            spread_over_tokens(own_part, [own_counts]).astype(jnp.float32), 6, axis=-1
        )
        if context is not None:
            context_shift, context_scale = jnp.split(
                spread_over_tokens(context_part, context_blocks).astype(jnp.float32), 2, axis=-1
            )
            context = context * (1 + context_scale) + context_shift
        y = layer_norm(x, epsilon=BLOCK_EPSILON) * (1 + scale) + shift
        y = self.attention(
            y, context, own_counts=own_counts, context_blocks=context_blocks, valid=valid
        )
        x = (x + gate * y).astype(x.dtype)
        y = layer_norm(x, epsilon=BLOCK_EPSILON) * (1 + mlp_scale) + mlp_shift
        return (x + mlp_gate * self.mlp(y)).astype(x.dtype)


def _by_reader(
    modulation: Float[Array, "b g k"],
) -> tuple[Float[Array, "b g own"], Float[Array, "b g context"]]:
    """Splits adaLN's eight vectors into the six of own tokens and the two of context tokens."""
    vectors = rearrange(modulation, "b g (r d) -> b g r d", r=8)
    own = vectors[:, :, np.array([0, 1, 4, 5, 6, 7])]  # shift, scale, gate, and the MLP's
    context = vectors[:, :, 2:4]  # shift, scale
    return rearrange(own, "b g r d -> b g (r d)"), rearrange(context, "b g r d -> b g (r d)")


def spread_over_tokens(
    values: Float[Array, "b g k"], blocks: Sequence[Sequence[int]]
) -> Float[Array, "b n k"]:
    """Repeats each image's vector over that image's tokens, block after block.

    A product with a one-hot matrix, exact in any type: on CPU a concatenation of broadcasts inside
    an elementwise loop is several times slower, and this stays dense in the backward pass too.
    """
    if len(blocks[0]) == 1:
        return values
    image = np.repeat(np.tile(np.arange(len(blocks[0])), len(blocks)), np.concatenate(blocks))
    one_hot = jnp.asarray(np.eye(len(blocks[0]))[image], values.dtype)
    one_hot = jnp.broadcast_to(one_hot, (values.shape[0], *one_hot.shape))
    exactly = jax.lax.Precision.HIGHEST if values.dtype == jnp.float32 else None
    return jnp.einsum("bng,bgk->bnk", one_hot, values, precision=exactly)
