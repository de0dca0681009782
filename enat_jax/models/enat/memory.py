"""What ENAT carries from one step to the next."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from enat_jax.core.plans import Plan
from enat_jax.models.enat.block import BLOCK_EPSILON
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.layers import LayerNorm, Mlp
from enat_jax.models.stack import make_stack

# Features of tokens, `[b p d]`; with `reuse = "all_layers"` of every encoder block, `[b p l d]`.
Carried = Float[Array, "b _ ... d"]


class Features(NamedTuple):
    """Features of a row's tokens by group, None where a group is empty.

    Attributes:
        previous: projected features of previous tokens, or what else is reused.
        new: the encoder's, of as many layers as are carried.
        masked: the decoder's; a shared stack gives both.
    """

    previous: Carried | None
    new: Carried | None
    masked: Float[Array, "b m d"]


class ReuseProjection(nnx.Module):
    """`f(z) = z + MLP(LN(z))`, which carries features from one step to the next (section 4.2)."""

    def __init__(self, width: int, mlp_ratio: float, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(width, epsilon=BLOCK_EPSILON)
        self.mlp = Mlp(width, mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        """Projects features of previous tokens."""
        return (features + self.mlp(self.norm(features))).astype(features.dtype)


def make_projection(cfg: ENATConfig, *, rngs: nnx.Rngs) -> Any:
    """The config's projection, a stack of them with `all_layers`, or None."""
    if not (cfg.carries_features and cfg.reuse_projection):
        return None

    def projection(rngs: nnx.Rngs) -> ReuseProjection:
        return ReuseProjection(cfg.width, cfg.mlp_ratio, dtype=jnp.dtype(cfg.dtype), rngs=rngs)

    if cfg.reuse == "all_layers":
        return make_stack(projection, cfg.encoder_depth, rngs=rngs)
    return projection(rngs)


def project(cfg: ENATConfig, projection: Any, features: Carried) -> Carried:
    """Features as this step reads them, and as it hands them on."""
    if projection is None:
        return features
    if cfg.reuse != "all_layers":
        return projection(features)
    if isinstance(projection, nnx.List):
        return jnp.stack([f(features[:, :, i]) for i, f in enumerate(projection)], axis=2)
    return jax.vmap(lambda f, z: f(z), in_axes=(0, 2), out_axes=2)(projection, features)


def initial_state(cfg: ENATConfig, batch: int, capacity: int) -> Carried:
    """Room for what steps of one image a row carry.

    In reveal order, with room for `capacity` revealed tokens; with `all_tokens` in raster order,
    for masked tokens change places in the other one. No capacity: no step is to read anything.
    """
    if cfg.reuse == "all_tokens":
        capacity = cfg.length if capacity else 0
    layers = (cfg.encoder_depth,) if cfg.reuse == "all_layers" else ()
    return jnp.zeros((batch, capacity, *layers, cfg.width), cfg.dtype)


def readable(cfg: ENATConfig, state: Carried, shape: Plan) -> Carried | None:
    """What a step of that shape reads of the state; None for nothing."""
    if cfg.reuse == "all_tokens":  # the first step, which sees no token, has nothing to read
        return state if shape.previous + shape.new and state.shape[1] else None
    return state[:, : shape.previous]


def reused_counts(cfg: ENATConfig, features: Carried | None, plans: Sequence[Plan]) -> list[int]:
    """How many tokens' features each image of a row has to read."""
    if features is None:
        return [0] * len(plans)
    if len(plans) == 1:
        return [features.shape[1]]
    if cfg.reuse == "all_tokens":  # as `ENAT.remember` has them
        return [cfg.length if plan.previous else 0 for plan in plans]
    return [plan.previous for plan in plans]


def exists(cfg: ENATConfig, size: int, shape: Plan, counts: Plan) -> list[Bool[Array, " k"]]:
    """Which of `size` reused, of the new and of the masked tokens exist in a padded step."""
    if cfg.reuse == "all_tokens":
        reused = jnp.full(size, counts.previous + counts.new > 0)
    else:
        reused = jnp.arange(size) < counts.previous
    return [reused, *(jnp.arange(shape[i]) < counts[i] for i in (1, 2))]


def write(
    cfg: ENATConfig,
    state: Carried,
    out: Features,
    positions: Int[Array, "b n"],
    masked_positions: Int[Array, "b m"],
    *,
    shape: Plan,
    counts: Plan | None,
) -> Carried:
    """The state after a step that returned `out`: new features, and reused ones as projected in it.

    Without `reproject` the reused ones stay as they were.

    Args:
        cfg: the network's.
        state: before the step.
        out: what the step returned.
        positions: of the new tokens.
        masked_positions: of the masked tokens.
        shape: the step's (padded) plan.
        counts: its traced counts, where it is padded.
    """
    previous = out.previous if cfg.reproject else None  # without: the state stays as it was put out
    if cfg.reuse == "all_tokens":
        if not state.shape[1]:
            return state
        state = state if previous is None else previous
        rows = jnp.arange(state.shape[0])[:, None]
        for group, (features, at) in enumerate(
            ((out.new, positions), (out.masked, masked_positions)), 1
        ):
            if features is not None:
                if counts is not None:  # padding goes nowhere
                    at = jnp.where(jnp.arange(shape[group]) < counts[group], at, cfg.length)
                state = state.at[rows, at].set(features, mode="drop")
        return state
    update = jax.lax.dynamic_update_slice_in_dim
    if previous is not None:
        state = update(state, previous, 0, axis=1)
    if out.new is not None and state.shape[1]:
        start = shape.previous if counts is None else counts.previous
        state = update(state, out.new, start, axis=1)
    return state
