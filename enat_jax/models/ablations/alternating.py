"""Self- and cross-attention in turns, in place of SC-attention (ENAT, table 4)."""

from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from enat_jax.models.attention import Segments
from enat_jax.models.enat.block import BLOCK_EPSILON, Block, Vectors
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.layers import layer_norm


class AlternatingBlock(Block):
    """A self-attention, a cross-attention on the context, and an MLP."""

    VECTORS: ClassVar = (*Block.VECTORS, "cross_shift", "cross_scale", "cross_gate")
    JOINT: ClassVar = False

    def __init__(self, cfg: ENATConfig, *, reads_context: bool, rngs: nnx.Rngs):
        super().__init__(cfg, reads_context=reads_context, rngs=rngs)
        cross = self.make_attention(cfg, rngs=rngs, reads_own=False) if reads_context else None
        self.cross_attention = cross

    @classmethod
    def vector_names(cls, reads_context: bool) -> tuple[str, ...]:
        """Without context, those of a block that reads none."""
        return cls.VECTORS if reads_context else Block.vector_names(False)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b m d"] | None,
        modulation: Float[Array, "b g r"],
        segments: Segments,
    ) -> Float[Array, "b n d"]:
        """Updates own tokens; arguments as in `Block`."""
        own_valid = cross_valid = None
        if segments.valid is not None:  # context first, then own tokens
            split = [jnp.split(mask, [mask.shape[-1] - count], axis=-1)
                     for mask, count in zip(segments.valid, segments.own, strict=True)]  # fmt: skip
            cross_valid, own_valid = zip(*split, strict=True)
        own = Vectors(*self.read_vectors(modulation, Vectors._fields, [segments.own]))
        y = layer_norm(x, epsilon=BLOCK_EPSILON) * (1 + own.scale) + own.shift
        y = self.attention(y, None, Segments(segments.own, valid=own_valid))
        x = (x + own.gate * y).astype(x.dtype)
        if context is not None and self.cross_attention is not None:
            context = self.modulated_context(context, modulation, segments)
            names = ("cross_shift", "cross_scale", "cross_gate")
            shift, scale, gate = self.read_vectors(modulation, names, [segments.own])
            y = layer_norm(x, epsilon=BLOCK_EPSILON) * (1 + scale) + shift
            segments = segments._replace(valid=cross_valid)
            y = self.cross_attention(y, context, segments)
            x = (x + gate * jnp.where(has_context(segments)[..., None], y, 0)).astype(x.dtype)
        return self.update_by_mlp(x, own)


def has_context(segments: Segments) -> Bool[Array, "#b n"]:
    """Per own token of a row, whether its image has any context to read."""
    readable = []
    for image, count in enumerate(segments.own):
        some = jnp.array(any(block[image] for block in segments.context))
        if segments.valid is not None:
            some &= jnp.any(segments.valid[image], axis=-1)
        readable.append(jnp.repeat(some.reshape(-1, 1), count, axis=1))
    return jnp.concatenate(readable, axis=1)
