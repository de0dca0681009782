"""ENAT: an encoder for visible tokens, a decoder for masked ones, and reused features."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from enat_jax.core.network import Features, RowPlan, Tokens
from enat_jax.models.attention import Segments
from enat_jax.models.enat.block import Block, normalised
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.enat.memory import Carried, LastLayer, exist
from enat_jax.models.layers import (
    EMBEDDING_STD,
    UNPLACED,
    Head,
    TokenEmbedding,
    dropout,
)
from enat_jax.models.stack import make_stack, map_stack, run_stack, unstack


class EmbeddedCondition(NamedTuple):
    """What blocks read of a condition, the same at every step.

    Attributes:
        encoder: adaLN's vectors per block and image, `[b l g r]`, or a list over the blocks `l`.
        decoder: the same of the decoder's blocks; both None where nothing is modulated.
        text: normalised features of captions' tokens, caption after caption of a row.
    """

    encoder: Any
    decoder: Any
    text: Float[Array, "b _ d"] | None = None


class ENAT(nnx.Module):
    """The network of ENAT (NeurIPS 2024), on rows that pack several images.

    A row holds `g` images, each with its own `Plan`; token axes run image after image. Ids and
    positions come in reveal order, so that an image's previous, new and masked tokens are slices.
    A condition is the images' class ids.

    Args:
        cfg: sizes.
        rngs: keys of the initialisation.
        placement: where blocks and activations lie; activations by `rows` after every block,
            `whole` and by `columns` around adaLN's layers, whose weights are more than a third of
            all and serve one vector per image.
        memory: what steps carry; the paper's by default.
        block: makes a block, as `Block` does.
    """

    def __init__(
        self,
        cfg: ENATConfig,
        *,
        rngs: nnx.Rngs,
        placement: Any = UNPLACED,
        memory: LastLayer | None = None,
        block: Callable[..., nnx.Module] = Block,
    ):
        self.cfg, self.placement = cfg, placement
        self.memory = memory or LastLayer(cfg)
        self.embedding = TokenEmbedding(cfg.codebook_size + 1, cfg.length, cfg.width, rngs=rngs)
        self.make_condition(rngs)
        self.reuse_projection = self.memory.make_projection(rngs=rngs)

        def stack(depth: int, reads_context: bool) -> Any:
            def make(rngs: nnx.Rngs) -> nnx.Module:
                return block(cfg, reads_context=reads_context, rngs=rngs)

            return make_stack(make, depth, rngs=rngs) if depth else None

        self.encoder: Any = stack(cfg.encoder_depth, cfg.encoder_attention != "none")
        self.decoder: Any = stack(cfg.decoder_depth, True)
        self.head = Head(cfg.width, cfg.codebook_size, dtype=jnp.dtype(cfg.dtype), rngs=rngs)

    def make_condition(self, rngs: nnx.Rngs) -> None:
        """The layers that read class ids."""
        shape = self.cfg.num_classes + 1, self.cfg.width
        self.class_embedding = nnx.Param(EMBEDDING_STD * jax.random.normal(rngs.params(), shape))

    def null_condition(self, condition: Int[Array, "b g"]) -> Int[Array, "b g"]:
        """The null class."""
        return jnp.full_like(condition, self.cfg.null_class_id)

    def embed_condition(self, condition: Int[Array, "b g"]) -> EmbeddedCondition:
        """AdaLN's vectors of all blocks; they depend on the class alone."""
        lay = self.placement.activations
        c = lay(jax.nn.silu(self.class_embedding[...][condition]), "whole")

        def vectors(blocks: Any) -> Any:
            made = map_stack(blocks, lambda block: block.modulation(c))
            return jax.tree.map(lambda x: lay(lay(x, "columns"), "rows"), made)

        return EmbeddedCondition(vectors(self.encoder), self.decoder and vectors(self.decoder))

    def embed(
        self, ids: Int[Array, "b n"] | int, positions: Int[Array, "b n"], key: jax.Array | None
    ) -> Float[Array, "b n d"]:
        """Embeds tokens; `key` turns dropout on."""
        x = dropout(self.embedding(ids, positions), self.cfg.dropout, key)
        return x.astype(self.cfg.dtype)

    def run(
        self,
        blocks: Any,
        x: Float[Array, "b n d"],
        vectors: Any,
        context: Float[Array, "b m d"] | None,
        segments: Segments,
        **options: Any,
    ) -> Any:
        """Own tokens through a stack; `vectors` are adaLN's, or pairs of them and contexts."""

        def apply(block: Any, x: Array, inputs: Any) -> Array:
            own, read = inputs if isinstance(inputs, tuple) else (inputs, context)
            return self.placement.activations(block(x, read, own, segments), "rows")

        return run_stack(blocks, x, vectors, apply, self.placement, remat=self.cfg.remat, **options)

    def encode(
        self,
        condition: EmbeddedCondition,
        tokens: Tokens,
        segments: Segments,
        *,
        recalled: Carried | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Carried | None, EmbeddedCondition]:
        """Features of new tokens, which read each other and normalised features of earlier ones.

        And the condition as the decoder is to read it. Where no token is new, there are none.
        """
        if not tokens.ids.shape[1]:
            return None, condition
        x = self.embed(tokens.ids, tokens.positions, key)
        return self.memory.encode(self, x, condition.encoder, recalled, segments), condition

    def decode(
        self,
        condition: EmbeddedCondition,
        x: Float[Array, "b m d"],
        context: Float[Array, "b _ d"] | None,
        segments: Segments,
    ) -> Float[Array, "b m d"]:
        """Masked tokens, which read each other and normalised features of visible ones."""
        return self.run(self.decoder, x, condition.decoder, context, segments)

    def __call__(
        self,
        condition: EmbeddedCondition,
        tokens: Tokens,
        row: RowPlan,
        *,
        recalled: Carried | None = None,
        key: jax.Array | None = None,
    ) -> Features:
        """One network call: encode the new tokens, decode the masked ones, which read them.

        What is recalled are features of the previous tokens as an earlier call put them out.
        """
        memory = self.memory
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        counts = memory.counts(recalled, row)
        readable = everything = None
        if row.counts is not None:
            images = list(zip(counts, row.plans, row.counts, strict=True))
            read = [
                (memory.exist(n, drawn), exist(plan.new, drawn.new)) for n, plan, drawn in images
            ]
            masked = [exist(plan.masked, drawn.masked) for _, plan, drawn in images]
            readable = [jnp.concatenate(parts, axis=-1) for parts in read]
            pairs = zip(readable, masked, strict=True)
            everything = [jnp.concatenate(parts, axis=-1) for parts in pairs]

        previous = earlier = None
        context, blocks = [], []
        if recalled is not None and recalled.shape[1]:
            previous = memory.project(self.reuse_projection, recalled)
            earlier = normalised(previous)
            context.append(memory.last_layer(earlier))
            blocks.append(counts)
        segments = Segments(row.new, [counts], readable)
        new, condition = self.encode(condition, tokens, segments, recalled=earlier, key=encoder_key)
        if new is not None:
            context.append(normalised(memory.last_layer(new)))
            blocks.append(row.new)
        x = self.embed(self.cfg.mask_id, tokens.masked_positions, decoder_key)
        read = jnp.concatenate(context, axis=1) if context else None
        segments = Segments(row.masked, blocks, everything)
        return Features(previous, new, self.decode(condition, x, read, segments))

    def logits(self, features: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Scores over the codebook, float32."""
        return self.head(features, self.embedding.word[...])

    def initial_memory(self, batch: int, capacity: int) -> Carried:
        """Room for what is carried while `capacity` tokens are revealed."""
        return self.memory.initial(batch, capacity)

    def predict(
        self, condition: EmbeddedCondition, memory: Carried, tokens: Tokens, row: RowPlan
    ) -> tuple[Float[Array, "b m v"], Carried]:
        """Logits of the masked tokens, and the memory with this step's features."""
        out = self(condition, tokens, row, recalled=self.memory.read(memory, row))
        return self.logits(out.masked), self.memory.write(memory, out, tokens, row)

    def recall(self, condition: EmbeddedCondition, tokens: Tokens, row: RowPlan) -> Carried | None:
        """Features of the previous tokens as an earlier step saw them, with the others masked."""
        if not tokens.ids.shape[1]:
            return None
        return self.memory.recall(self, condition, tokens, row)

    def unstacked(self) -> "ENAT":
        """The same network with every block's weights in arrays of their own."""
        model = nnx.merge(*nnx.split(self))
        model.encoder = unstack(self.encoder)
        model.decoder = self.decoder and unstack(self.decoder)
        model.reuse_projection = self.memory.unstacked_projection(self.reuse_projection)
        return model
