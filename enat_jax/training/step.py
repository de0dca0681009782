"""One optimiser step on rows that pack images with different plans."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from enat_jax.config import TrainConfig
from enat_jax.core.network import Network, RowPlan, Tokens
from enat_jax.core.plans import Plan
from enat_jax.models.layers import UNPLACED, cast_kernels
from enat_jax.training.losses import masked_cross_entropy
from enat_jax.training.optim import skip_unless_finite


class TrainState(NamedTuple):
    """Everything a run changes, besides its position in the data."""

    step: Int[Array, ""]
    params: nnx.State
    ema: nnx.State
    opt_state: Any


class Draws(NamedTuple):
    """The random part of a step: the order tokens are revealed in, and the conditions kept.

    Attributes:
        order: a permutation of positions per image.
        condition: the images' conditions, leaves `[b g ...]`, the null condition where dropped.
    """

    order: Int[Array, "b g l"]
    condition: PyTree


def make_draws(
    key: jax.Array, condition: PyTree, null_condition: PyTree, length: int, *, dropout: float
) -> Draws:
    """Draws a uniformly random reveal order per image, and drops conditions at a rate."""
    order_key, drop_key = jax.random.split(key)
    images = jax.tree.leaves(condition)[0].shape[:2]
    order = jnp.argsort(jax.random.uniform(order_key, (*images, length)), axis=-1)
    dropped = jax.random.bernoulli(drop_key, dropout, images)

    def keep(given: Array, null: Array) -> Array:
        return jnp.where(dropped.reshape(*images, *[1] * (given.ndim - 2)), null, given)

    return Draws(order, jax.tree.map(keep, condition, null_condition))


def row_loss(
    model: Network,
    ema_model: Network,
    token_ids: Int[Array, "b g l"],
    draws: Draws,
    plans: Sequence[Plan],
    *,
    label_smoothing: float,
    mean_over: Literal["images", "tokens"] = "images",
    key: jax.Array | None = None,
) -> Float[Array, ""]:
    """Mean loss over the masked tokens of rows (ENAT section 4).

    Previous features come from the moving average in evaluation mode, from one pass over the
    previous tokens alone, without a gradient.

    Args:
        model: the network that learns.
        ema_model: the network whose features are reused.
        token_ids: true ids in raster order.
        draws: reveal orders and conditions.
        plans: the plan of each image in a row.
        label_smoothing: of the cross-entropy.
        mean_over: as `TrainConfig` says.
        key: turns dropout on.
    """
    in_order = jnp.take_along_axis(token_ids, draws.order, axis=-1)
    ends = [(0, p.previous, p.previous + p.new, sum(p)) for p in plans]

    def pack(x: Int[Array, "b g l"], first: int, last: int) -> Int[Array, "b n"]:
        bounds = [(end[first], end[last]) for end in ends]
        parts = [x[:, image, start:end] for image, (start, end) in enumerate(bounds)]
        return jnp.concatenate(parts, axis=1)

    row, condition = RowPlan(tuple(plans)), draws.condition
    earlier = Tokens(pack(in_order, 0, 1), pack(draws.order, 0, 1), pack(draws.order, 1, 3))
    recalled = ema_model.recall(ema_model.embed_condition(condition), earlier, row)
    now = Tokens(pack(in_order, 1, 2), pack(draws.order, 1, 2), pack(draws.order, 2, 3))
    features = model(
        model.embed_condition(condition),
        now,
        row,
        recalled=jax.lax.stop_gradient(recalled),
        key=key,
    )
    by_image = mean_over == "images"
    weights = [np.full(plan.masked, 1 / plan.masked if by_image else 1.0) for plan in plans]
    return masked_cross_entropy(
        model.logits(features.masked),
        pack(in_order, 2, 3),
        jnp.asarray(np.concatenate(weights), jnp.float32),
        label_smoothing=label_smoothing,
    )


def training_step(
    state: TrainState,
    token_ids: Int[Array, "b l"],
    condition: PyTree,
    key: jax.Array,
    *,
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    plans: Sequence[Plan],
    cfg: TrainConfig,
    ema_decay: float,
    placement: Any = UNPLACED,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimiser step; jit it with everything after `key` fixed.

    A step whose loss, gradient or weights are not finite changes nothing but the count of steps.

    Consecutive images of the batch share a row, with a plan for each. Conditions, such as class
    ids, have leaves `[b ...]`. The step's own key is folded in from the run's and `state.step`.

    Returns:
        The state after the step; its loss, gradient norm, and 1 if it was skipped.
    """
    model = nnx.merge(graphdef, state.params)
    dtype = jnp.dtype(model.cfg.dtype)
    weights, ema_weights = (
        placement.weights(cast_kernels(tree, dtype)) for tree in (state.params, state.ema)
    )
    draw_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    tokens, condition = jax.tree.map(
        lambda x: rearrange(x, "(b g) ... -> b g ...", g=len(plans)), (token_ids, condition)
    )
    null, length = model.null_condition(condition), tokens.shape[-1]
    draws = make_draws(draw_key, condition, null, length, dropout=cfg.class_dropout)
    ema_model = nnx.merge(graphdef, ema_weights)

    def loss_and_grad(tokens: Array, draws: Draws, key: jax.Array) -> tuple[Array, nnx.State]:
        def loss(weights: nnx.State) -> Array:
            return row_loss(
                nnx.merge(graphdef, weights),
                ema_model,
                tokens,
                draws,
                plans,
                label_smoothing=cfg.label_smoothing,
                mean_over=cfg.mean_over,
                key=key,
            )

        value, grads = jax.value_and_grad(loss)(weights)
        grads = jax.tree.map(
            lambda g, p: g.astype(p.dtype), placement.gradients(grads), state.params
        )
        return value, grads

    if cfg.accumulation == 1:
        loss, grads = loss_and_grad(tokens, draws, dropout_key)
    else:  # a microbatch takes rows from every device's share
        parts = jax.tree.map(
            lambda x: rearrange(x, "(b a) ... -> a b ...", a=cfg.accumulation), (tokens, draws)
        )
        keys = jax.random.split(dropout_key, cfg.accumulation)
        zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), state.params))

        def add(total: Any, micro: Any) -> tuple[Any, None]:
            (tokens, draws), key = micro
            return jax.tree.map(jnp.add, total, loss_and_grad(tokens, draws, key)), None

        total, _ = jax.lax.scan(add, zero, (parts, keys))
        loss, grads = jax.tree.map(lambda x: x / cfg.accumulation, total)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = cast(nnx.State, optax.apply_updates(cast(Any, state.params), updates))
    ema: Any = optax.incremental_update(params, cast(Any, state.ema), 1 - ema_decay)
    after = TrainState(state.step + 1, params, ema, opt_state)
    norm = optax.tree.norm(grads)
    after, skipped = skip_unless_finite(state, after, loss, norm, params)
    return after, {"loss": loss, "grad_norm": norm, "skipped": skipped}
