"""Masked-token cross-entropy with label smoothing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def masked_cross_entropy(
    logits: Float[Array, "b m v"],
    targets: Int[Array, "b m"],
    weights: Float[Array, "#b m"] | Float[Array, " m"],
    *,
    label_smoothing: float = 0.1,
) -> Float[Array, ""]:
    """Weighted mean of the smoothed cross-entropy, in float32.

    Args:
        logits: scores of the masked tokens over the codebook.
        targets: their true ids, in [0, v); anything where the weight is 0.
        weights: what each token counts, >= 0; they need not sum to 1.
        label_smoothing: share of the target spread evenly over the codebook, in [0, 1].
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    index = jnp.clip(targets, 0, logits.shape[-1] - 1)
    true = jnp.take_along_axis(log_probs, index[..., None], axis=-1)[..., 0]
    token_loss = -(1 - label_smoothing) * true - label_smoothing * log_probs.mean(axis=-1)
    weights = jnp.broadcast_to(weights, targets.shape)
    return jnp.sum(weights * token_loss) / jnp.sum(weights)
