"""ENAT: an encoder for visible tokens, a decoder for masked ones, and reused features."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from enat_jax.core.plans import Plan
from enat_jax.models.ablations.blocked_attention import attention_masks
from enat_jax.models.attention import Valid
from enat_jax.models.enat import memory as reuse
from enat_jax.models.enat.block import BLOCK_EPSILON, Block, ContextAttention
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.enat.memory import Carried, Features
from enat_jax.models.head import Head
from enat_jax.models.layers import (
    EMBEDDING_STD,
    UNPLACED,
    TokenEmbedding,
    dropout,
    layer_norm,
)
from enat_jax.models.rows import Rows
from enat_jax.models.stack import make_stack, map_stack, run_stack, unstack


class Modulation(NamedTuple):
    """adaLN's eight vectors per block and image, `[b, l, g, 8 * d]`, or a list over `l`."""

    encoder: Any
    decoder: Any


class ENAT(nnx.Module):
    """The network of ENAT (NeurIPS 2024) and of its ablations, on rows that pack several images.

    A row holds `g` images, each with its own `Plan`; token axes run image after image. Positions
    and ids come in reveal order, so that an image's previous, new and masked tokens are slices.

    Args:
        cfg: sizes.
        rngs: keys of the initialisation.
        placement: where blocks and activations lie; activations by `rows` after every block,
            `whole` and by `columns` around adaLN's layers, whose weights are more than a third of
            all and serve one vector per image.
    """

    def __init__(
        self,
        cfg: ENATConfig,
        *,
        rngs: nnx.Rngs,
        placement: Any = UNPLACED,
    ):
        self.cfg = cfg
        self.placement = placement
        self.embedding = TokenEmbedding(cfg.codebook_size + 1, cfg.length, cfg.width, rngs=rngs)
        self.class_embedding = nnx.Param(
            EMBEDDING_STD * jax.random.normal(rngs.params(), (cfg.num_classes + 1, cfg.width))
        )
        self.reuse_projection = reuse.make_projection(cfg, rngs=rngs)

        def stack(depth: int, context: ContextAttention) -> Any:
            def block(rngs: nnx.Rngs) -> Block:
                return Block(
                    cfg.width,
                    cfg.num_heads,
                    cfg.mlp_ratio,
                    dtype=jnp.dtype(cfg.dtype),
                    attention=cfg.attention,
                    rngs=rngs,
                    context=context,
                )

            return make_stack(block, depth, rngs=rngs) if depth else None

        self.encoder: Any = stack(cfg.encoder_depth, cfg.encoder_attention)
        self.decoder: Any = stack(cfg.decoder_depth, cfg.decoder_attention)
        self.head = Head(cfg.width, cfg.codebook_size, dtype=jnp.dtype(cfg.dtype), rngs=rngs)

    def modulate(self, class_ids: Int[Array, "b g"]) -> Modulation:
        """AdaLN's vectors of all blocks; they depend on the class alone."""
        c = self.placement.activations(jax.nn.silu(self.class_embedding[...][class_ids]), "whole")

        def vectors(blocks: Any) -> Any:
            made = map_stack(blocks, lambda block: block.modulation(c))
            by_columns = jax.tree.map(lambda x: self.placement.activations(x, "columns"), made)
            return jax.tree.map(lambda x: self.placement.activations(x, "rows"), by_columns)

        return Modulation(vectors(self.encoder), self.decoder and vectors(self.decoder))

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
        previous: Carried | None = None,
        reused: Sequence[int] = (),
        valid: Valid | None = None,
        key: jax.Array | None = None,
    ) -> Carried:
        """Features of the new tokens, which read reused features and each other.

        Args:
            modulation: from `modulate`.
            token_ids: ids of the new tokens.
            positions: their positions.
            plans: the plan of each image in the row.
            previous: normalised projected features of reused tokens, None where there are none.
            reused: how many they are of each image.
            valid: which of an image's reused and new tokens exist; None for all.
            key: turns dropout on.
        """
        x = self.embed(token_ids, positions, key)
        images = {"own_counts": [p.new for p in plans], "context_blocks": [reused], "valid": valid}
        if self.cfg.reuse != "all_layers":
            return self._run(self.encoder, x, modulation.encoder, previous, images)
        stacked = not isinstance(self.encoder, nnx.List)
        per_block: Any = modulation.encoder
        if previous is not None and stacked:
            per_block = (per_block, rearrange(previous, "b p l d -> b l p d"))
        elif previous is not None:
            per_block = list(zip(per_block, jnp.unstack(previous, axis=2), strict=True))
        kept = self._run(self.encoder, x, per_block, None, images, keep=True)[1]
        return rearrange(kept, "b l n d -> b n l d") if stacked else jnp.stack(kept, axis=2)

    def _run(
        self,
        blocks: Any,
        x: Float[Array, "b n d"],
        per_block: Any,
        context: Float[Array, "b c d"] | None,
        images: dict[str, Any],
        *,
        keep: bool = False,
    ) -> Any:
        """Own tokens through a stack.

        `per_block` holds adaLN's vectors, or pairs of them and contexts; `images` says whose tokens
        are whose, as `Block` takes it.
        """

        def apply(block: Block, x: Array, inputs: Any) -> Array:
            vectors, read = inputs if isinstance(inputs, tuple) else (inputs, context)
            return self.placement.activations(block(x, read, vectors, **images), "rows")

        remat = self.cfg.remat
        return run_stack(blocks, x, per_block, apply, self.placement, remat=remat, keep=keep)

    def __call__(
        self,
        modulation: Modulation,
        token_ids: Int[Array, "b n"],
        positions: Int[Array, "b n"],
        masked_positions: Int[Array, "b m"],
        plans: Sequence[Plan],
        *,
        features: Carried | None = None,
        counts: Plan | None = None,
        key: jax.Array | None = None,
    ) -> Features:
        """One network call: encode the new tokens, decode the masked ones, which read them.

        Args:
            modulation: from `modulate`.
            token_ids: ids of the new tokens, image after image.
            positions: their positions.
            masked_positions: positions of the masked tokens.
            plans: the (padded) plan of each image in the row.
            features: features of the previous tokens (or what else is reused) as the call before
                returned them, image after image.
            counts: traced counts within the padded plan; rows of one image only.
            key: turns dropout on.

        Returns:
            The features of all tokens; `logits` reads the masked ones'.
        """
        if self.cfg.stacks == "shared":
            rows = Rows(self.cfg.length, plans, counts)
            masks = jnp.full_like(masked_positions, self.cfg.mask_id)
            ids = rows.together(token_ids, masks)
            x = self.embed(ids, rows.together(positions, masked_positions), key)
            images = {
                "own_counts": [self.cfg.length] * len(plans),
                "valid": attention_masks(self.cfg, plans if counts is None else [counts]),
            }
            x = self._run(self.encoder, x, modulation.encoder, None, images)
            return Features(None, *rows.apart(x))
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        reused = reuse.reused_counts(self.cfg, features, plans)
        encoder_valid = decoder_valid = None
        if counts is not None:
            (shape,) = plans
            exists = reuse.exists(self.cfg, reused[0], shape, counts)
            encoder_valid = [jnp.concatenate(exists[:2])]
            decoder_valid = [jnp.concatenate(exists)]

        def normalised(x: Array) -> Array:
            return layer_norm(x, epsilon=BLOCK_EPSILON).astype(x.dtype)

        def last(x: Array) -> Array:
            return x[:, :, -1] if self.cfg.reuse == "all_layers" else x

        previous = encoded = readable = None
        context, context_blocks = [], []
        if features is not None and features.shape[1]:
            previous = reuse.project(self.cfg, self.reuse_projection, features)
            readable = normalised(previous)
            context.append(last(readable))
            context_blocks.append(reused)
        if token_ids.shape[1]:
            encoded = self.encode(
                modulation,
                token_ids,
                positions,
                plans,
                previous=readable,
                reused=reused,
                valid=encoder_valid,
                key=encoder_key,
            )
            context.append(normalised(last(encoded)))
            context_blocks.append([plan.new for plan in plans])
        visible = jnp.concatenate(context, axis=1) if context else None
        x = self.embed(self.cfg.mask_id, masked_positions, decoder_key)
        images = {
            "own_counts": [plan.masked for plan in plans],
            "context_blocks": context_blocks,
            "valid": decoder_valid,
        }
        x = self._run(self.decoder, x, modulation.decoder, visible, images)
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
    ) -> Carried | None:
        """Features of the previous tokens as an earlier step saw them, with the others hidden.

        With `all_tokens` of the hidden ones too, in images that have previous tokens.
        """
        if not token_ids.shape[1]:
            return None
        modulation = self.modulate(class_ids)
        earlier = [Plan(0, plan.previous, plan.new + plan.masked) for plan in plans]
        if self.cfg.reuse != "all_tokens":
            return self.encode(modulation, token_ids, positions, earlier)
        earlier = [plan if plan.new else Plan(0, 0, 0) for plan in earlier]
        hidden = jax.lax.split(hidden_positions, [p.new + p.masked for p in plans], axis=1)
        kept = [part for part, plan in zip(hidden, earlier, strict=True) if plan.new]
        out = self(modulation, token_ids, positions, jnp.concatenate(kept, axis=1), earlier)
        assert out.new is not None
        return Rows(self.cfg.length, earlier).together(out.new, out.masked)

    def train_logits(
        self,
        class_ids: Int[Array, "b g"],
        token_ids: Int[Array, "b n"],
        positions: Int[Array, "b n"],
        masked_positions: Int[Array, "b m"],
        plans: Sequence[Plan],
        *,
        features: Carried | None,
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

    def initial_state(self, batch: int, capacity: int) -> Carried:
        """Room for what is carried while `capacity` tokens are revealed; see `reuse`."""
        return reuse.initial_state(self.cfg, batch, capacity)

    def predict(
        self,
        condition: Modulation,
        state: Carried,
        token_ids: Int[Array, "b n"],
        positions: Int[Array, "b n"],
        masked_positions: Int[Array, "b m"],
        shape: Plan,
        counts: Plan | None,
    ) -> tuple[Float[Array, "b m v"], Carried]:
        """Logits of the masked tokens, and the state with this step's features."""
        out = self(
            condition,
            token_ids,
            positions,
            masked_positions,
            [shape],
            features=reuse.readable(self.cfg, state, shape),
            counts=counts,
        )
        state = reuse.write(
            self.cfg, state, out, positions, masked_positions, shape=shape, counts=counts
        )
        return self.logits(out.masked), state

    def unstacked(self) -> "ENAT":
        """The same network with every block's weights in arrays of their own."""
        graphdef, params = nnx.split(self)
        model = nnx.merge(graphdef, params)
        model.encoder = unstack(self.encoder)
        model.decoder = self.decoder and unstack(self.decoder)
        if self.cfg.reuse == "all_layers" and self.reuse_projection is not None:
            model.reuse_projection = unstack(self.reuse_projection)
        return model
