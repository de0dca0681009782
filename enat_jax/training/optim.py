"""The optimiser: AdamW with linear warm-up, and the moving average of its parameters (EMA)."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from enat_jax.config import OptimConfig

State = TypeVar("State", bound=Any)


def learning_rate_schedule(cfg: OptimConfig, total_steps: int) -> Callable[[Any], Array]:
    """Learning rate at a step, counted from 0: `lr * min(max(step - 1, 0) / warmup, 1)`."""

    def schedule(step: Any) -> Array:
        done = jnp.maximum(jnp.asarray(step, jnp.float32) - 1, 0)
        rate = cfg.learning_rate * jnp.minimum(done / max(cfg.warmup_steps, 1), 1)
        if cfg.decay == "cosine":
            span = max(total_steps - cfg.warmup_steps, 1)
            progress = jnp.clip((done - cfg.warmup_steps) / span, 0, 1)
            rate = rate * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return rate

    return schedule


def make_optimizer(
    cfg: OptimConfig, learning_rate: Callable[[Any], Array] | float
) -> optax.GradientTransformation:
    """AdamW on every parameter, after clipping where the config asks for it."""
    adamw = optax.adamw(learning_rate, *cfg.betas, eps=cfg.epsilon, weight_decay=cfg.weight_decay)
    if cfg.max_grad_norm:
        return optax.chain(optax.clip_by_global_norm(cfg.max_grad_norm), adamw)
    return adamw


def skip_unless_finite(before: State, after: State, *values: PyTree) -> tuple[State, Array]:
    """A step that is not applied where a value is infinite or not a number; it still counts.

    With losses, gradient norms and new weights all of the state is finite: the EMA is a mean of
    weights, and the moments are means of gradients and of their squares, whose sum is in the norm.
    To judge those as well would keep a second copy of them until the last is known.

    Args:
        before: a state with a `step`, finite.
        after: the state after the step.
        values: losses, gradient norms, and all new weights.

    Returns:
        The state, and 1.0 where the step was skipped, else 0.0.
    """
    finite = jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(values)]))
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
    return kept._replace(step=after.step), 1.0 - finite.astype(jnp.float32)
