"""Captions encoded beside the new tokens at every step, which the paper's FLOPs fit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from enat_jax.core.network import Tokens
from enat_jax.models.attention import Segments
from enat_jax.models.captions import Captions
from enat_jax.models.enat.block import normalised
from enat_jax.models.enat.memory import Carried
from enat_jax.models.enat.network import EmbeddedCondition
from enat_jax.models.enat.text import TextENAT


class TextEveryStepENAT(TextENAT):
    """Captions and new tokens read each other in the encoder; nothing of a caption is carried."""

    def embed_condition(self, condition: Captions) -> EmbeddedCondition:
        """The captions' tokens as they enter the encoder."""
        return EmbeddedCondition(None, None, self.caption_embedding(condition.text))

    def encode(
        self,
        condition: EmbeddedCondition,
        tokens: Tokens,
        segments: Segments,
        *,
        recalled: Carried | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Carried | None, EmbeddedCondition]:
        """Features of new tokens, and the condition with those of the captions at this step."""
        assert condition.text is not None
        length, images = self.cfg.text_length, len(segments.own)
        texts = jnp.split(condition.text, images, axis=1)
        new = jax.lax.split(self.embed(tokens.ids, tokens.positions, key), segments.own, axis=1)
        own = [part for pair in zip(texts, new, strict=True) for part in pair]
        valid = segments.valid and [
            _with_text(mask, mask.shape[-1] - count, length)
            for mask, count in zip(segments.valid, segments.own, strict=True)
        ]
        together = Segments([length + count for count in segments.own], segments.context, valid)
        x = self.run(self.encoder, jnp.concatenate(own, axis=1), None, recalled, together)
        parts = jax.lax.split(x, [part.shape[1] for part in own], axis=1)
        text = normalised(jnp.concatenate(parts[::2], axis=1))
        features = jnp.concatenate(parts[1::2], axis=1) if sum(segments.own) else None
        return features, condition._replace(text=text)


def _with_text(mask: Array, context: int, length: int) -> Array:
    """Which keys may be read, with those of a caption between context and own ones."""
    there = jnp.ones((*mask.shape[:-1], length), bool)
    return jnp.concatenate([mask[..., :context], there, mask[..., context:]], axis=-1)
