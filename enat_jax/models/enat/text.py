"""ENAT from captions: a caption is context that is encoded once per image."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from enat_jax.core.network import Tokens
from enat_jax.models.attention import Segments
from enat_jax.models.captions import CaptionEmbedding, Captions, null_captions
from enat_jax.models.enat.block import BLOCK_EPSILON, Block, normalised
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.enat.memory import Carried
from enat_jax.models.enat.network import ENAT, EmbeddedCondition
from enat_jax.models.layers import LayerNorm, Mlp


class TextBlock(Block):
    """ENAT's block where nothing is modulated: norms have a learned scale and bias instead."""

    def __init__(self, cfg: ENATConfig, *, reads_context: bool, rngs: nnx.Rngs):
        self.attention = self.make_attention(cfg, rngs=rngs, reads_context=reads_context)
        self.attention_norm = LayerNorm(cfg.width, epsilon=BLOCK_EPSILON)
        norm = LayerNorm(cfg.width, epsilon=BLOCK_EPSILON) if reads_context else None
        self.context_norm: Any = norm
        self.mlp_norm = LayerNorm(cfg.width, epsilon=BLOCK_EPSILON)
        self.mlp = Mlp(cfg.width, cfg.mlp_ratio, dtype=jnp.dtype(cfg.dtype), rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b m d"] | None,
        modulation: None,
        segments: Segments,
    ) -> Float[Array, "b n d"]:
        """Updates own tokens; context is normalised already, but for this block's scale."""
        if context is not None:
            norm = self.context_norm
            context = (context * norm.scale[...] + norm.bias[...]).astype(x.dtype)
        x = x + self.attention(self.attention_norm(x), context, segments)
        return (x + self.mlp(self.mlp_norm(x))).astype(x.dtype)


class TextENAT(ENAT):
    """ENAT on captions: `[text, reused]` is the encoder's context, `[text, reused, new]` the other.

    The captions' tokens run through the encoder's own blocks alone, once per image. A condition is
    `Captions`; all else is as in `ENAT`.
    """

    def make_condition(self, rngs: nnx.Rngs) -> None:
        """The layers that read captions."""
        self.caption_embedding = CaptionEmbedding(self.cfg, rngs=rngs)

    def null_condition(self, condition: Captions) -> Captions:
        """The empty captions."""
        return null_captions(condition)

    def embed_condition(self, condition: Captions) -> EmbeddedCondition:
        """The captions encoded; they read nothing of the image."""
        x = self.caption_embedding(condition.text)
        segments = Segments([self.cfg.text_length] * condition.text.shape[1])
        text = normalised(self.run(self.encoder, x, None, None, segments))
        return EmbeddedCondition(None, None, text)

    def encode(
        self,
        condition: EmbeddedCondition,
        tokens: Tokens,
        segments: Segments,
        *,
        recalled: Carried | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Carried | None, EmbeddedCondition]:
        """As ENAT's, with captions before what is recalled."""
        recalled, segments = self._after_text(condition, recalled, segments)
        return super().encode(condition, tokens, segments, recalled=recalled, key=key)

    def decode(
        self,
        condition: EmbeddedCondition,
        x: Float[Array, "b m d"],
        context: Float[Array, "b _ d"] | None,
        segments: Segments,
    ) -> Float[Array, "b m d"]:
        """As ENAT's, with captions before the visible tokens."""
        return super().decode(condition, x, *self._after_text(condition, context, segments))

    def _after_text(
        self,
        condition: EmbeddedCondition,
        context: Float[Array, "b _ d"] | None,
        segments: Segments,
    ) -> tuple[Float[Array, "b _ d"], Segments]:
        """Context and whose it is, with the captions of all images before it."""
        text, length = condition.text, self.cfg.text_length
        assert text is not None
        read = text if context is None else jnp.concatenate([text, context], axis=1)
        valid = segments.valid and [
            jnp.pad(x, ((0, 0),) * 3 + ((length, 0),), constant_values=True) for x in segments.valid
        ]
        blocks = [[length] * len(segments.own), *segments.context]
        return read, Segments(segments.own, blocks, valid)
