"""One optimiser step on rows that pack images with different plans."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from enat_jax.core.plans import Plan
from enat_jax.models.layers import UNPLACED, cast_kernels
from enat_jax.training.losses import masked_cross_entropy
from enat_jax.training.optim import skip_unless_finite, update_ema

MeanOver = Literal["images", "tokens"]


@runtime_checkable
class Network(Protocol):
    """What a step asks of a network, on rows that pack several images."""

    def remember(
        self,
        class_ids: Int[Array, "b g"],
        token_ids: Int[Array, "b p"],
        positions: Int[Array, "b p"],
        hidden_positions: Int[Array, "b h"],
        plans: Sequence[Plan],
    ) -> Any:
        """What an earlier step, at which only previous tokens were revealed, hands on; or None."""
        ...

    def train_logits(
        self,
        class_ids: Int[Array, "b g"],
        token_ids: Int[Array, "b n"],
        positions: Int[Array, "b n"],
        masked_positions: Int[Array, "b m"],
        plans: Sequence[Plan],
        *,
        features: Any,
        key: jax.Array | None,
    ) -> Float[Array, "b m v"]:
        """Logits of the masked tokens, given the new ones' ids and what was remembered."""
        ...


class TrainState(NamedTuple):
    """Everything a run changes, besides its position in the data."""

    step: Int[Array, ""]
    params: nnx.State
    ema: nnx.State
    opt_state: Any


class Draws(NamedTuple):
    """The random part of a step: the order tokens are revealed in, and the classes kept.

    Attributes:
        order: a permutation of positions per image.
        class_ids: the images' classes, the null class where dropped.
    """

    order: Int[Array, "b g l"]
    class_ids: Int[Array, "b g"]


@dataclass(frozen=True)
class StepConfig:
    """What a step computes.

    Attributes:
        class_dropout: probability that an image trains the null class.
        label_smoothing: of the cross-entropy.
        mean_over: what the loss is the mean over, see `row_loss`.
        ema_decay: of the parameters' moving average.
        accumulation: microbatches whose gradients are averaged.
    """

    class_dropout: float = 0.235
    label_smoothing: float = 0.1
    mean_over: MeanOver = "images"
    ema_decay: float = 0.9999
    accumulation: int = 1


def make_draws(
    key: jax.Array,
    class_ids: Int[Array, "b g"],
    length: int,
    *,
    class_dropout: float,
    null_class_id: int,
) -> Draws:
    """Draws a uniformly random reveal order per image and drops classes."""
    order_key, class_key = jax.random.split(key)
    order = jnp.argsort(jax.random.uniform(order_key, (*class_ids.shape, length)), axis=-1)
    dropped = jax.random.bernoulli(class_key, class_dropout, class_ids.shape)
    return Draws(order, jnp.where(dropped, null_class_id, class_ids))


def row_loss(
    model: Network,
    ema_model: Network,
    token_ids: Int[Array, "b g l"],
    draws: Draws,
    plans: Sequence[Plan],
    *,
    label_smoothing: float,
    mean_over: MeanOver = "images",
    key: jax.Array | None = None,
) -> Float[Array, ""]:
    """Mean loss over the masked tokens of rows (ENAT section 4).

    Previous features come from the moving average in evaluation mode, from one pass over the
    previous tokens alone, without a gradient.

    Args:
        model: the network that learns.
        ema_model: the network whose features are reused.
        token_ids: true ids in raster order.
        draws: reveal orders and classes.
        plans: the plan of each image in a row.
        label_smoothing: of the cross-entropy.
        mean_over: `images` takes the mean of every image's mean, `tokens` counts every masked
            token of a row alike.
        key: turns dropout on.
    """
    in_order = jnp.take_along_axis(token_ids, draws.order, axis=-1)
    ends = [(0, p.previous, p.previous + p.new, sum(p)) for p in plans]

    def pack(x: Int[Array, "b g l"], first: int, last: int) -> Int[Array, "b n"]:
        bounds = [(end[first], end[last]) for end in ends]
        parts = [x[:, image, start:end] for image, (start, end) in enumerate(bounds)]
        return jnp.concatenate(parts, axis=1)

    features = ema_model.remember(
        draws.class_ids,
        pack(in_order, 0, 1),
        pack(draws.order, 0, 1),
        pack(draws.order, 1, 3),
        plans,
    )
    logits = model.train_logits(
        draws.class_ids,
        pack(in_order, 1, 2),
        pack(draws.order, 1, 2),
        pack(draws.order, 2, 3),
        plans,
        features=jax.lax.stop_gradient(features),
        key=key,
    )
    by_image = mean_over == "images"
    weights = [np.full(plan.masked, 1 / plan.masked if by_image else 1.0) for plan in plans]
    return masked_cross_entropy(
        logits,
        pack(in_order, 2, 3),
        jnp.asarray(np.concatenate(weights), jnp.float32),
        label_smoothing=label_smoothing,
    )


def training_step(
    state: TrainState,
    token_ids: Int[Array, "b l"],
    class_ids: Int[Array, " b"],
    key: jax.Array,
    *,
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    plans: Sequence[Plan],
    cfg: StepConfig,
    placement: Any = UNPLACED,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimiser step; jit it with everything after `key` fixed.

    A step whose loss or gradient is not finite changes nothing but the count of steps.

    Args:
        state: before the step.
        token_ids: a batch of images; consecutive ones share a row.
        class_ids: their classes.
        key: the run's key; the step's own is folded in from `state.step`.
        graphdef: of the network.
        optimizer: its gradient transformation.
        plans: the plan of each image in a row.
        cfg: the step's settings.
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
    tokens = rearrange(token_ids, "(b g) l -> b g l", g=len(plans))
    draws = make_draws(
        draw_key,
        rearrange(class_ids, "(b g) -> b g", g=len(plans)),
        tokens.shape[-1],
        class_dropout=cfg.class_dropout,
        null_class_id=model.cfg.null_class_id,
    )
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
    after = TrainState(
        step=state.step + 1,
        params=params,
        ema=update_ema(state.ema, params, cfg.ema_decay),
        opt_state=opt_state,
    )
    norm = optax.tree.norm(grads)
    after, skipped = skip_unless_finite(state, after, loss, norm)
    return after, {"loss": loss, "grad_norm": norm, "skipped": skipped}
