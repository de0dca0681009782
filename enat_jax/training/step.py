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
from enat_jax.training.strata import Stratum, draw_plans


class TrainState(NamedTuple):
    """Everything a run changes, besides its position in the data."""

    step: Int[Array, ""]
    params: nnx.State
    ema: nnx.State
    opt_state: Any


class Draws(NamedTuple):
    """The random part of a step: how much is revealed in which order, and the conditions kept.

    Attributes:
        order: a permutation of positions per image.
        condition: the images' conditions, leaves `[b g ...]`, the null condition where dropped.
        ema_condition: those that the moving average sees; the same by default.
        plans: each image's plan, within the row's shapes; those shapes by default.
    """

    order: Int[Array, "b g l"]
    condition: PyTree
    ema_condition: PyTree = None
    plans: Int[Array, "b g 3"] | None = None


def make_draws(
    key: jax.Array,
    condition: PyTree,
    null_condition: PyTree,
    length: int,
    row: Sequence[Stratum],
    *,
    dropout: float,
    further_dropout: float,
) -> Draws:
    """Draws a uniformly random reveal order and a plan per image, and drops conditions.

    A share `dropout` of the conditions is dropped, and of the rest a share `further_dropout` for
    the network that learns alone.
    """
    order_key, drop_key = jax.random.split(key)
    images = jax.tree.leaves(condition)[0].shape[:2]
    order = jnp.argsort(jax.random.uniform(order_key, (*images, length)), axis=-1)

    def drop(given: PyTree, key: jax.Array, rate: float) -> PyTree:
        if not rate:
            return given
        dropped = jax.random.bernoulli(key, rate, images)

        def keep(given: Array, null: Array) -> Array:
            return jnp.where(dropped.reshape(*images, *[1] * (given.ndim - 2)), null, given)

        return jax.tree.map(keep, given, null_condition)

    ema_condition = drop(condition, drop_key, dropout)
    learnt = drop(ema_condition, jax.random.fold_in(drop_key, 1), further_dropout)
    is_fixed = all(len(stratum.plans) == 1 for stratum in row)
    plans = None if is_fixed else draw_plans(jax.random.fold_in(key, 2), row, images[0])
    return Draws(order, learnt, ema_condition, plans)


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
        plans: the plan of each image in a row, or the shape that the drawn ones fit into.
        label_smoothing: of the cross-entropy.
        mean_over: as `TrainConfig` says.
        key: turns dropout on.
    """
    shapes, every = tuple(plans), range(len(plans))
    counts = shapes
    if draws.plans is not None:
        counts = tuple(Plan(*rearrange(draws.plans[:, image], "b c -> c b"))
                       for image in range(len(shapes)))  # fmt: skip
    row = RowPlan(shapes, None if draws.plans is None else counts)
    in_order = jnp.take_along_axis(token_ids, draws.order, axis=-1)

    def pack(
        x: Int[Array, "b g l"], skipped: int, sizes: Sequence[int], images: Sequence[int] = every
    ) -> Int[Array, "b n"]:
        """Of each of the images so many tokens, after its tokens of the first `skipped` kinds."""
        parts = []
        for image, size in zip(images, sizes, strict=True):
            start = jnp.reshape(jnp.asarray(sum(counts[image][:skipped])), (-1, 1))
            index = jnp.minimum(start + jnp.arange(size), x.shape[-1] - 1)
            parts.append(jnp.take_along_axis(x[:, image], index, axis=1))
        return jnp.concatenate(parts, axis=1)

    order, recalled = draws.order, None
    if reusing := [image for image in every if shapes[image].previous]:
        given = draws.condition if draws.ema_condition is None else draws.ema_condition
        given = jax.tree.map(lambda x: x[:, np.array(reusing)], given)
        before = row.of(reusing)
        hidden = [plan.new + plan.masked for plan in before.plans]
        earlier = Tokens(pack(in_order, 0, before.previous, reusing),
                         pack(order, 0, before.previous, reusing),
                         pack(order, 1, hidden, reusing))  # fmt: skip
        recalled = ema_model.recall(ema_model.embed_condition(given), earlier, before)
    now = Tokens(pack(in_order, 1, row.new), pack(order, 1, row.new), pack(order, 2, row.masked))
    features = model(
        model.embed_condition(draws.condition),
        now,
        row,
        recalled=jax.lax.stop_gradient(recalled),
        key=key,
    )
    weights = []
    for plan, count in zip(shapes, counts, strict=True):
        masked = jnp.reshape(jnp.asarray(count.masked), (-1, 1))
        share = 1 / masked if mean_over == "images" else 1.0
        weights.append(jnp.where(jnp.arange(plan.masked) < masked, share, 0.0))
    return masked_cross_entropy(
        model.logits(features.masked),
        pack(in_order, 2, row.masked),
        jnp.concatenate(weights, axis=1),
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
    row: Sequence[Stratum],
    cfg: TrainConfig,
    ema_decay: float,
    placement: Any = UNPLACED,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimiser step; jit it with everything after `key` fixed.

    A step whose loss, gradient or weights are not finite changes nothing but the count of steps.

    Args:
        state: before the step.
        token_ids: a batch of images; consecutive ones share a row.
        condition: what they are to be generated from, leaves `[b ...]`, such as class ids.
        key: the run's key; the step's own is folded in from `state.step`.
        graphdef: of the network.
        optimizer: its gradient transformation.
        row: the stratum of each image in a row.
        cfg: the run's settings.
        ema_decay: of the parameters' moving average.
        placement: where weights and gradients lie.

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
        lambda x: rearrange(x, "(b g) ... -> b g ...", g=len(row)), (token_ids, condition)
    )
    draws = make_draws(
        draw_key,
        condition,
        model.null_condition(condition),
        tokens.shape[-1],
        row,
        dropout=cfg.class_dropout,
        further_dropout=cfg.further_class_dropout,
    )
    ema_model = nnx.merge(graphdef, ema_weights)

    def loss_and_grad(tokens: Array, draws: Draws, key: jax.Array) -> tuple[Array, nnx.State]:
        def loss(weights: nnx.State) -> Array:
            return row_loss(
                nnx.merge(graphdef, weights),
                ema_model,
                tokens,
                draws,
                [stratum.shape for stratum in row],
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
