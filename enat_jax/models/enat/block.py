"""The Transformer block of ENAT: SC-attention, then an MLP, under adaLN on rows of images."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from enat_jax.models.attention import Segments, SelfCrossAttention
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.layers import Linear, Mlp, layer_norm, zeros

BLOCK_EPSILON = 1e-6  # of the norms inside blocks and of those that feed them


class Vectors(NamedTuple):
    """AdaLN's vectors of own tokens, `[b n d]` each: of the attention, then of the MLP."""

    shift: Float[Array, "b _ d"]
    scale: Float[Array, "b _ d"]
    gate: Float[Array, "b _ d"]
    mlp_shift: Float[Array, "b _ d"]
    mlp_scale: Float[Array, "b _ d"]
    mlp_gate: Float[Array, "b _ d"]


class Block(nnx.Module):
    """Attention, SC-attention where it reads context, and an MLP, modulated through adaLN."""

    # adaLN's vectors in the order in which one linear layer makes them
    VECTORS: ClassVar = ("shift", "scale", "context_shift", "context_scale", "gate",
                         "mlp_shift", "mlp_scale", "mlp_gate")  # fmt: skip
    JOINT: ClassVar = True  # context and own tokens are read in one softmax

    def __init__(self, cfg: ENATConfig, *, reads_context: bool, rngs: nnx.Rngs):
        self.vectors = self.vector_names(reads_context)
        joint = reads_context and self.JOINT
        self.attention = self.make_attention(cfg, rngs=rngs, reads_context=joint)
        dtype = jnp.dtype(cfg.dtype)
        self.mlp = Mlp(cfg.width, cfg.mlp_ratio, dtype=dtype, rngs=rngs)
        # zero: every block starts as the identity
        out = len(self.vectors) * cfg.width
        self.modulation = Linear(cfg.width, out, dtype=dtype, kernel_init=zeros, rngs=rngs)

    @classmethod
    def vector_names(cls, reads_context: bool) -> tuple[str, ...]:
        """AdaLN's vectors, those of context tokens where there are any."""
        return tuple(name for name in cls.VECTORS if reads_context or "context" not in name)

    @staticmethod
    def make_attention(cfg: ENATConfig, *, rngs: nnx.Rngs, **reads: bool) -> SelfCrossAttention:
        """Attention of the config's sizes."""
        return SelfCrossAttention(
            cfg.width,
            cfg.num_heads,
            dtype=jnp.dtype(cfg.dtype),
            implementation=cfg.attention,
            shares_key_value=cfg.key_value == "shared",
            rngs=rngs,
            **reads,
        )

    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b m d"] | None,
        modulation: Float[Array, "b g r"],
        segments: Segments,
    ) -> Float[Array, "b n d"]:
        """Updates own tokens; context is normalised, the vectors are from `self.modulation`."""
        own = Vectors(*self.read_vectors(modulation, Vectors._fields, [segments.own]))
        if context is not None:
            context = self.modulated_context(context, modulation, segments)
        y = layer_norm(x, epsilon=BLOCK_EPSILON) * (1 + own.scale) + own.shift
        x = (x + own.gate * self.attention(y, context, segments)).astype(x.dtype)
        return self.update_by_mlp(x, own)

    def modulated_context(
        self, context: Float[Array, "b m d"], modulation: Float[Array, "b g r"], segments: Segments
    ) -> Float[Array, "b m d"]:
        """Context with its own shift and scale."""
        names = ("context_shift", "context_scale")
        shift, scale = self.read_vectors(modulation, names, segments.context)
        return context * (1 + scale) + shift

    def update_by_mlp(self, x: Float[Array, "b n d"], own: Vectors) -> Float[Array, "b n d"]:
        """The block's second half."""
        y = layer_norm(x, epsilon=BLOCK_EPSILON) * (1 + own.mlp_scale) + own.mlp_shift
        return (x + own.mlp_gate * self.mlp(y)).astype(x.dtype)

    def read_vectors(
        self,
        modulation: Float[Array, "b g r"],
        names: Sequence[str],
        blocks: Sequence[Sequence[int]],
    ) -> list[Float[Array, "b _ d"]]:
        """Vectors by name, in float32, each image's spread over its tokens."""
        vectors = rearrange(modulation, "b g (r d) -> b g r d", r=len(self.vectors))
        chosen = vectors[:, :, np.array([self.vectors.index(name) for name in names])]
        spread = spread_over_tokens(rearrange(chosen, "b g r d -> b g (r d)"), blocks)
        return jnp.split(spread.astype(jnp.float32), len(names), axis=-1)


def normalised(features: Float[Array, "b n ... d"]) -> Float[Array, "b n ... d"]:
    """Features as blocks read them as context."""
    return layer_norm(features, epsilon=BLOCK_EPSILON).astype(features.dtype)


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
