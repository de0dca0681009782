"""Other things to carry between steps: features of all tokens, or of all layers (ENAT, table 6)."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from enat_jax.core.network import Features, RowPlan, Tokens
from enat_jax.core.plans import Plan
from enat_jax.models.attention import Segments
from enat_jax.models.enat.memory import Carried, LastLayer, ReuseProjection, exist
from enat_jax.models.rows import Rows
from enat_jax.models.stack import make_stack, unstack


class AllTokens(LastLayer):
    """The last layer's features of all tokens, of masked ones the decoder's.

    In raster order: in reveal order masked tokens change places from step to step.
    """

    def initial(self, batch: int, capacity: int) -> Carried:
        """Room for all tokens; none where no step is to read anything."""
        return super().initial(batch, self.cfg.length if capacity else 0)

    def read(self, memory: Carried, row: RowPlan) -> Carried | None:
        """All of it, but at the first step, which sees no token."""
        (shape,) = row.plans
        return memory if shape.previous + shape.new and memory.shape[1] else None

    def recall(self, network: Any, condition: Any, tokens: Tokens, row: RowPlan) -> Carried:
        """Features of all tokens."""

        def before(plan: Plan) -> Plan:
            return Plan(0, plan.previous, plan.new + plan.masked)

        counts = row.counts and tuple(before(counts) for counts in row.counts)
        earlier = RowPlan(tuple(before(plan) for plan in row.plans), counts)
        out = network(condition, tokens, earlier)
        return Rows(self.cfg.length, earlier).together(out.new, out.masked)

    def counts(self, recalled: Carried | None, row: RowPlan) -> list[int]:
        """All tokens of an image or none."""
        if recalled is None or len(row.plans) == 1:
            return [0 if recalled is None else recalled.shape[1]] * len(row.plans)
        return [self.cfg.length if plan.previous else 0 for plan in row.plans]

    def exist(self, recalled: int, counts: Plan) -> Bool[Array, "b 1 1 k"]:
        """They exist as soon as an earlier step saw any."""
        return exist(recalled, jnp.where(counts.previous + counts.new > 0, recalled, 0))

    def write(self, memory: Carried, out: Features, tokens: Tokens, row: RowPlan) -> Carried:
        """Every token's features at its position."""
        if not memory.shape[1]:
            return memory
        if self.cfg.reproject and out.previous is not None:
            memory = out.previous
        rows = jnp.arange(memory.shape[0])[:, None]
        places = [tokens.positions, tokens.masked_positions]
        if row.counts is not None:  # padding goes nowhere
            _, *counts = row.counts[0]
            places = [jnp.where(exist(at.shape[1], count)[:, 0, 0], at, self.cfg.length)
                      for at, count in zip(places, counts, strict=True)]  # fmt: skip
        for features, at in zip((out.new, out.masked), places, strict=True):
            if features is not None:
                memory = memory.at[rows, at].set(features, mode="drop")
        return memory


class AllLayers(LastLayer):
    """Features of revealed tokens after every encoder block, each read by that block alone."""

    def make_projection(self, *, rngs: nnx.Rngs) -> Any:
        """A projection per block, stacked."""
        if not self.cfg.reuse_projection:
            return None
        depth = self.cfg.encoder_depth
        return make_stack(lambda rngs: ReuseProjection(self.cfg, rngs=rngs), depth, rngs=rngs)

    def unstacked_projection(self, projection: Any) -> Any:
        """A list of them."""
        return None if projection is None else unstack(projection)

    def project(self, projection: Any, features: Carried) -> Carried:
        """Each block's features by its own projection."""
        if projection is None:
            return features
        if isinstance(projection, nnx.List):
            layers = [f(features[:, :, i]) for i, f in enumerate(projection)]
            return jnp.stack(layers, axis=2)
        return jax.vmap(lambda f, z: f(z), in_axes=(0, 2), out_axes=2)(projection, features)

    def initial(self, batch: int, capacity: int) -> Carried:
        """Room for the features of every block."""
        size = (batch, capacity, self.cfg.encoder_depth, self.cfg.width)
        return jnp.zeros(size, self.cfg.dtype)

    def encode(
        self, network: Any, x: Array, vectors: Any, recalled: Carried | None, segments: Segments
    ) -> Carried:
        """Runs the encoder with a context per block, and keeps what every block gives."""
        is_stacked = not isinstance(network.encoder, nnx.List)
        if recalled is not None and is_stacked:
            vectors = (vectors, rearrange(recalled, "b p l d -> b l p d"))
        elif recalled is not None:
            vectors = list(zip(vectors, jnp.unstack(recalled, axis=2), strict=True))
        _, kept = network.run(network.encoder, x, vectors, None, segments, keep=True)
        return rearrange(kept, "b l n d -> b n l d") if is_stacked else jnp.stack(kept, axis=2)

    def last_layer(self, features: Carried) -> Float[Array, "b p d"]:
        """The last block's."""
        return features[:, :, -1]
