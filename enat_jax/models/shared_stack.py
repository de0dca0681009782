"""How a row is laid out where all its tokens run through one stack: the paper's baseline."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from enat_jax.models.attention import Valid
from enat_jax.models.enat_config import Blocked, ENATConfig
from enat_jax.plans import Plan


class Together(NamedTuple):
    """All tokens, image after image, each one's visible tokens and then its masked ones.

    Attributes:
        token_ids: ids, the mask's where masked.
        positions: positions.
        visible: where in the row each visible token is found again.
        masked: where each masked token is.
        own_counts: tokens of each image.
        valid: per image, which token may read which; None where all may.
    """

    token_ids: Int[Array, "b l"]
    positions: Int[Array, "b l"]
    visible: Any
    masked: Any
    own_counts: list[int]
    valid: Valid | None


def lay_together(
    cfg: ENATConfig,
    token_ids: Int[Array, "b n"],
    positions: Int[Array, "b n"],
    masked_positions: Int[Array, "b m"],
    plans: Sequence[Plan],
    counts: Plan | None,
) -> Together:
    """Brings the tokens of each image together.

    Args:
        cfg: the network's.
        token_ids: ids of the visible tokens, image after image.
        positions: their positions.
        masked_positions: positions of the masked tokens.
        plans: the (padded) plan of each image; no token is `previous`.
        counts: traced counts within the padded plan, of rows of one image; the padding is left
            out of the row, so that it costs nothing but rows of the head.
    """
    index, visible, masked = (
        _places(plans) if counts is None else _without_padding(cfg, plans[0], counts)
    )
    masks = jnp.full_like(masked_positions, cfg.mask_id)
    new = [plan.new for plan in plans] if counts is None else [counts.new]
    valid = [readable(cfg.blocked, count, cfg.length) for count in new]
    return Together(
        jnp.concatenate([token_ids, masks], axis=1)[:, index],
        jnp.concatenate([positions, masked_positions], axis=1)[:, index],
        visible,
        masked,
        [cfg.length] * len(plans),
        [mask for mask in valid if mask is not None] or None,
    )


def _places(plans: Sequence[Plan]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which token (all visible ones, then all masked) lies at each place, and where each lies."""
    counts = np.array([(plan.new, plan.masked) for plan in plans])
    tokens = np.arange(counts.sum())
    parts = np.split(tokens, np.cumsum(counts.T.ravel())[:-1])  # visible ones of each image first
    images = len(plans)
    index = np.concatenate([part for i in range(images) for part in (parts[i], parts[images + i])])
    visible, masked = np.split(np.argsort(index), [counts[:, 0].sum()])
    return index, visible, masked


def _without_padding(cfg: ENATConfig, shape: Plan, counts: Plan) -> tuple[Array, Array, Array]:
    """The same for one image, with padding after its visible and after its masked tokens."""
    place = jnp.arange(cfg.length)
    index = jnp.where(place < counts.new, place, place + shape.new - counts.new)
    masked = jnp.minimum(counts.new + jnp.arange(shape.masked), cfg.length - 1)
    return index, jnp.minimum(jnp.arange(shape.new), cfg.length - 1), masked


def readable(blocked: Blocked, visible: Any, length: int) -> Bool[Array, "l l"] | None:
    """Which tokens (columns) each token of an image (rows) may read; None for all.

    A token always reads itself: without it, the masked tokens of the first step, when nothing is
    visible, would have nothing to read under `masked_to_masked`.

    Args:
        blocked: the attention that is left out.
        visible: how many tokens are visible; they come first.
        length: tokens per image.
    """
    if blocked == "none":
        return None
    is_visible = jnp.arange(length) < visible
    kinds = {"visible": is_visible, "masked": ~is_visible}
    query, key = blocked.split("_to_")
    return ~(kinds[query][:, None] & kinds[key]) | jnp.eye(length, dtype=bool)
