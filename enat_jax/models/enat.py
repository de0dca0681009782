"""ENAT: an encoder for visible tokens, a decoder for masked ones, and reused features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from enat_jax.models.attention import Implementation
from enat_jax.models.block import BLOCK_EPSILON, Block
from enat_jax.models.head import Head
from enat_jax.models.layers import (
    EMBEDDING_STD,
    Constrain,
    TokenEmbedding,
    dropout,
    layer_norm,
)
from enat_jax.models.reuse import ReuseProjection
from enat_jax.models.stack import Remat, make_stack, map_stack, run_stack, unstack
from enat_jax.plans import Plan


@dataclass(frozen=True)
class ENATConfig:
    """Sizes of ENAT and how it computes.

    Attributes:
        name: which network this is.
        length: tokens per image.
        codebook_size: number of discrete codes; also the mask token's id.
        num_classes: number of classes; also the null class's id.
        width: features per token.
        num_heads: attention heads; divides `width`.
        encoder_depth: blocks that new tokens run through.
        decoder_depth: blocks that masked tokens run through.
        mlp_ratio: hidden width of the MLPs over `width`.
        dropout: rate on the embeddings, in training only.
        dtype: type of activations and matrix operands; parameters stay float32.
        attention: implementation of attention.
        remat: what the backward pass recomputes.
    """

    name: Literal["enat"] = "enat"
    length: int = 256
    codebook_size: int = 1024
    num_classes: int = 1000
    width: int = 768
    num_heads: int = 8
    encoder_depth: int = 15
    decoder_depth: int = 1
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Implementation = "xla"
    remat: Remat = "none"

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked token."""
        return self.codebook_size

    @property
    def carries_features(self) -> bool:
        """Whether a step can read what earlier steps computed."""
        return True

    @property
    def null_class_id(self) -> int:
        """The class of the unconditional branch."""
        return self.num_classes


class Modulation(NamedTuple):
    """adaLN's eight vectors per block and image, `[b, l, g, 8 * d]`, or a list over `l`."""

    encoder: Any
    decoder: Any


class Features(NamedTuple):
    """Features of a row's tokens by group, None where a group is empty.

    Attributes:
        previous: projected features of previous tokens.
        new: the encoder's.
        masked: the decoder's.
    """

    previous: Float[Array, "b p d"] | None
    new: Float[Array, "b n d"] | None
    masked: Float[Array, "b m d"]


class ENAT(nnx.Module):
    """The network of ENAT (NeurIPS 2024), on rows that pack several images.

    A row holds `g` images, each with its own `Plan`; token axes run image after image. Positions
    and ids come in reveal order, so that an image's previous, new and masked tokens are slices.

    Args:
        cfg: sizes.
        rngs: keys of the initialisation.
        constrain: applied to activations; placement rules go in here. It is told how they are to
            lie: by `rows` after every block; `whole` and by `columns` around adaLN's layers, whose
            weights are more than a third of all and serve one vector per image.
        place_block: applied to every block where its weights are used, for the same purpose.
    """

    def __init__(
        self,
        cfg: ENATConfig,
        *,
        rngs: nnx.Rngs,
        constrain: Constrain = lambda x, how: x,
        place_block: Callable[[Any], Any] = lambda block: block,
    ):
        self.cfg = cfg
        self.constrain, self.place_block = constrain, place_block
        self.embedding = TokenEmbedding(cfg.codebook_size + 1, cfg.length, cfg.width, rngs=rngs)
        self.class_embedding = nnx.Param(
            EMBEDDING_STD * jax.random.normal(rngs.params(), (cfg.num_classes + 1, cfg.width))
        )
        self.reuse_projection = ReuseProjection(
            cfg.width, cfg.mlp_ratio, dtype=jnp.dtype(cfg.dtype), rngs=rngs
        )

        def block(rngs: nnx.Rngs) -> Block:
            return Block(
                cfg.width,
                cfg.num_heads,
                cfg.mlp_ratio,
                dtype=jnp.dtype(cfg.dtype),
                attention=cfg.attention,
                rngs=rngs,
            )

        self.encoder: Any = make_stack(block, cfg.encoder_depth, rngs=rngs)
        self.decoder: Any = make_stack(block, cfg.decoder_depth, rngs=rngs)
        self.head = Head(cfg.width, cfg.codebook_size, dtype=jnp.dtype(cfg.dtype), rngs=rngs)

    def modulate(self, class_ids: Int[Array, "b g"]) -> Modulation:
        """AdaLN's vectors of all blocks; they depend on the class alone."""
        c = self.constrain(jax.nn.silu(self.class_embedding[...][class_ids]), "whole")

        def vectors(blocks: Any) -> Any:
            made = map_stack(blocks, lambda block: block.modulation(c))
            by_columns = jax.tree.map(lambda x: self.constrain(x, "columns"), made)
            return jax.tree.map(lambda x: self.constrain(x, "rows"), by_columns)

        return Modulation(vectors(self.encoder), vectors(self.decoder))

    def embed(
        self,
        token_ids: Int[Array, "b n"] | int,
        positions: Int[Array, "b n"],
        key: jax.Array | None = None,
    ) -> Float[Array, "b n d"]:
        """Embeds tokens; `key` turns dropout on."""
        x = dropout(self.embedding(token_ids, positions), self.cfg.dropout, key)
        return x.astype(self.cfg.dtype)

    def encode(
        self,
        modulation: Modulation,
        token_ids: Int[Array, "b n"],
        positions: Int[Array, "b n"],
        plans: Sequence[Plan],
        *,
        previous: Float[Array, "b p d"] | None = None,
        valid: Bool[Array, " k"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "b n d"]:
        """Features of the new tokens, which read previous features and each other.

        Args:
            modulation: from `modulate`.
            token_ids: ids of the new tokens.
            positions: their positions.
            plans: the plan of each image in the row.
            previous: normalised projected features of previous tokens, None where there are none.
            valid: which of previous and new tokens exist; None for all.
            key: turns dropout on.
        """
        own_counts = [plan.new for plan in plans]
        context_blocks = [[plan.previous for plan in plans]]

        def apply(block: Block, x: Array, vectors: Array) -> Array:
            x = block(
                x,
                previous,
                vectors,
                own_counts=own_counts,
                context_blocks=context_blocks,
                valid=valid,
            )
            return self.constrain(x, "rows")

        x = self.embed(token_ids, positions, key)
        return run_stack(
            self.encoder, x, modulation.encoder, apply, self.place_block, remat=self.cfg.remat
        )

    def decode(
        self,
        modulation: Modulation,
        positions: Int[Array, "b m"],
        plans: Sequence[Plan],
        *,
        context: Float[Array, "b c d"] | None,
        valid: Bool[Array, " k"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "b m d"]:
        """Features of the masked tokens, which read the visible ones and each other.

        Args:
            modulation: from `modulate`.
            positions: positions of the masked tokens.
            plans: the plan of each image in the row.
            context: normalised features of all previous, then all new tokens; None if none.
            valid: which of previous, new and masked tokens exist; None for all.
            key: turns dropout on.
        """
        own_counts = [plan.masked for plan in plans]
        context_blocks = [[plan.previous for plan in plans], [plan.new for plan in plans]]

        def apply(block: Block, x: Array, vectors: Array) -> Array:
            x = block(
                x,
                context,
                vectors,
                own_counts=own_counts,
                context_blocks=context_blocks,
                valid=valid,
            )
            return self.constrain(x, "rows")

        x = self.embed(self.cfg.mask_id, positions, key)
        return run_stack(
            self.decoder, x, modulation.decoder, apply, self.place_block, remat=self.cfg.remat
        )

    def __call__(
        self,
        modulation: Modulation,
        token_ids: Int[Array, "b n"],
        positions: Int[Array, "b n"],
        masked_positions: Int[Array, "b m"],
        plans: Sequence[Plan],
        *,
        features: Float[Array, "b p d"] | None = None,
        counts: Plan | None = None,
        key: jax.Array | None = None,
    ) -> Features:
        """One network call: encode the new tokens, decode the masked ones.

        Args:
            modulation: from `modulate`.
            token_ids: ids of the new tokens, image after image.
            positions: their positions.
            masked_positions: positions of the masked tokens.
            plans: the (padded) plan of each image in the row.
            features: features of the previous tokens as the call before returned them.
            counts: traced counts within the padded plan; rows of one image only.
            key: turns dropout on.

        Returns:
            The features of all tokens; `logits` reads the masked ones'.
        """
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        encoder_valid = decoder_valid = None
        if counts is not None:
            (shape,) = plans
            exists = [jnp.arange(size) < count for size, count in zip(shape, counts, strict=True)]
            encoder_valid = jnp.concatenate(exists[:2])
            decoder_valid = jnp.concatenate(exists)

        previous = encoded = None
        context = []
        if features is not None and features.shape[1]:
            previous = self.reuse_projection(features)
            context.append(layer_norm(previous, epsilon=BLOCK_EPSILON).astype(previous.dtype))
        if token_ids.shape[1]:
            encoded = self.encode(
                modulation,
                token_ids,
                positions,
                plans,
                previous=context[0] if context else None,
                valid=encoder_valid,
                key=encoder_key,
            )
            context.append(layer_norm(encoded, epsilon=BLOCK_EPSILON).astype(encoded.dtype))
        x = self.decode(
            modulation,
            masked_positions,
            plans,
            context=jnp.concatenate(context, axis=1) if context else None,
            valid=decoder_valid,
            key=decoder_key,
        )
        return Features(previous, encoded, x)

    def logits(self, features: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Scores over the codebook, float32."""
        return self.head(features, self.embedding.word[...])

    # What training asks of a network (`training_step.Network`).

    def remember(
        self,
        class_ids: Int[Array, "b g"],
        token_ids: Int[Array, "b p"],
        positions: Int[Array, "b p"],
        hidden_positions: Int[Array, "b h"],
        plans: Sequence[Plan],
    ) -> Float[Array, "b p d"] | None:
        """Features of the previous tokens as an earlier step saw them, with the others hidden."""
        if not token_ids.shape[1]:
            return None
        earlier = [Plan(0, plan.previous, plan.new + plan.masked) for plan in plans]
        return self.encode(self.modulate(class_ids), token_ids, positions, earlier)

    def train_logits(
        self,
        class_ids: Int[Array, "b g"],
        token_ids: Int[Array, "b n"],
        positions: Int[Array, "b n"],
        masked_positions: Int[Array, "b m"],
        plans: Sequence[Plan],
        *,
        features: Float[Array, "b p d"] | None,
        key: jax.Array | None,
    ) -> Float[Array, "b m v"]:
        """Logits of a row's masked tokens; `features` come from `remember`."""
        out = self(
            self.modulate(class_ids),
            token_ids,
            positions,
            masked_positions,
            plans,
            features=features,
            key=key,
        )
        return self.logits(out.masked)

    # What the generation loop asks of a network (`generate.Network`).

    def condition(self, class_ids: Int[Array, " b"]) -> Modulation:
        """What one image a row needs from its class at every step."""
        return self.modulate(class_ids[:, None])

    def initial_state(self, batch: int, capacity: int) -> Float[Array, "b p d"]:
        """Room for the features of `capacity` revealed tokens, in reveal order."""
        return jnp.zeros((batch, capacity, self.cfg.width), self.cfg.dtype)

    def predict(
        self,
        condition: Modulation,
        state: Float[Array, "b p d"],
        token_ids: Int[Array, "b n"],
        positions: Int[Array, "b n"],
        masked_positions: Int[Array, "b m"],
        shape: Plan,
        counts: Plan | None,
    ) -> tuple[Float[Array, "b m v"], Float[Array, "b p d"]]:
        """Logits of the masked tokens, and the features with the new tokens' at their end."""
        out = self(
            condition,
            token_ids,
            positions,
            masked_positions,
            [shape],
            features=state[:, : shape.previous],
            counts=counts,
        )
        update = jax.lax.dynamic_update_slice_in_dim
        if out.previous is not None:
            state = update(state, out.previous, 0, axis=1)
        if out.new is not None and state.shape[1]:
            start = shape.previous if counts is None else counts.previous
            state = update(state, out.new, start, axis=1)
        return self.logits(out.masked), state

    def unstacked(self) -> "ENAT":
        """The same network with every block's weights in arrays of their own."""
        graphdef, params = nnx.split(self)
        model = nnx.merge(graphdef, params)
        model.encoder, model.decoder = unstack(self.encoder), unstack(self.decoder)
        return model
