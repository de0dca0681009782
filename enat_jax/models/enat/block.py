"""The Transformer block: attention, then an MLP, under adaLN on rows that pack images."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from enat_jax.models.attention import Implementation, SelfCrossAttention, Valid
from enat_jax.models.enat.config import ContextAttention
from enat_jax.models.layers import Linear, Mlp, layer_norm, zeros

BLOCK_EPSILON = 1e-6  # of the norms inside blocks and of those that feed them

# which of adaLN's vectors are own tokens' (shift, scale and gate of the attention, of the MLP, and
# of a cross-attention), and which are context tokens' (shift and scale)
_READERS: dict[ContextAttention, tuple[tuple[int, ...], slice]] = {
    "none": ((0, 1, 2, 3, 4, 5), slice(0)),
    "joint": ((0, 1, 4, 5, 6, 7), slice(2, 4)),
    "alternating": ((0, 1, 4, 5, 6, 7, 8, 9, 10), slice(2, 4)),
}
VECTORS: dict[ContextAttention, int] = {"none": 6, "joint": 8, "alternating": 11}
"""How many vectors adaLN makes per block and image."""


class Block(nnx.Module):
    """Attention and an MLP, modulated by the class through adaLN.

    Args:
        width: features per token.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over `width`.
        dtype: of activations.
        attention: implementation of attention.
        rngs: keys of the initialisation.
        context: `joint` reads context and own tokens in one softmax (SC-attention), `alternating`
            has a self-attention and then a cross-attention, `none` reads no context.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        dtype: jnp.dtype,
        attention: Implementation,
        rngs: nnx.Rngs,
        context: ContextAttention = "joint",
    ):
        def attend(*, own: bool, context: bool) -> SelfCrossAttention:
            return SelfCrossAttention(
                width,
                num_heads,
                dtype=dtype,
                implementation=attention,
                rngs=rngs,
                reads_own=own,
                reads_context=context,
            )

        self.context: ContextAttention = context
        self.attention = attend(own=True, context=context == "joint")
        self.mlp = Mlp(width, mlp_ratio, dtype=dtype, rngs=rngs)
        # zero: every block starts as the identity
        self.modulation = Linear(
            width, VECTORS[context] * width, dtype=dtype, kernel_init=zeros, rngs=rngs
        )
        alternating = context == "alternating"
        self.cross_attention = attend(own=False, context=True) if alternating else None

    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b m d"] | None,
        modulation: Float[Array, "b g r"],
        *,
        own_counts: Sequence[int],
        context_blocks: Sequence[Sequence[int]] = (),
        valid: Valid | None = None,
    ) -> Float[Array, "b n d"]:
        """Updates own tokens; `context` is already normalised, for it is the same in all blocks."""
        own_part, context_part = _by_reader(modulation, self.context)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *cross = jnp.split(
            spread_over_tokens(own_part, [own_counts]).astype(jnp.float32),
            len(_READERS[self.context][0]),
            axis=-1,
        )
        if context is not None:
            context_shift, context_scale = jnp.split(
                spread_over_tokens(context_part, context_blocks).astype(jnp.float32), 2, axis=-1
            )
            context = context * (1 + context_scale) + context_shift
        own_valid, cross_valid = valid, None
        if valid is not None and self.cross_attention is not None:
            cross_valid, own_valid = zip(
                *(
                    jnp.split(mask, [mask.shape[-1] - count], axis=-1)
                    for mask, count in zip(valid, own_counts, strict=True)
                ),
                strict=True,
            )
        y = layer_norm(x, epsilon=BLOCK_EPSILON) * (1 + scale) + shift
        y = self.attention(
            y,
            context if self.context == "joint" else None,
            own_counts=own_counts,
            context_blocks=context_blocks,
            valid=own_valid,
        )
        x = (x + gate * y).astype(x.dtype)
        if self.cross_attention is not None and context is not None:
            shift, scale, gate = cross
            y = layer_norm(x, epsilon=BLOCK_EPSILON) * (1 + scale) + shift
            y = self.cross_attention(
                y,
                context,
                own_counts=own_counts,
                context_blocks=context_blocks,
                valid=cross_valid,
            )
            x = (x + gate * y).astype(x.dtype)
        y = layer_norm(x, epsilon=BLOCK_EPSILON) * (1 + mlp_scale) + mlp_shift
        return (x + mlp_gate * self.mlp(y)).astype(x.dtype)


def _by_reader(
    modulation: Float[Array, "b g k"], attention: ContextAttention
) -> tuple[Float[Array, "b g own"], Float[Array, "b g context"]]:
    """Splits adaLN's vectors into those of own tokens and the two of context tokens."""
    own, context = _READERS[attention]
    vectors = rearrange(modulation, "b g (r d) -> b g r d", r=VECTORS[attention])
    parts = vectors[:, :, np.array(own)], vectors[:, :, context]
    of_own, of_context = (rearrange(part, "b g r d -> b g (r d)") for part in parts)
    return of_own, of_context


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
