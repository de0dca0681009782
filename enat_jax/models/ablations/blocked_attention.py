"""Attention that the paper's baseline variants leave out (ENAT, table 1)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from enat_jax.core.plans import Plan
from enat_jax.models.attention import Valid
from enat_jax.models.enat.config import Blocked, ENATConfig


def attention_masks(cfg: ENATConfig, plans: Sequence[Plan]) -> Valid | None:
    """Per image of a row, which of its tokens may read which; None where all may."""
    if cfg.blocked == "none":
        return None
    return [readable(cfg.blocked, plan.new, cfg.length) for plan in plans]


def readable(blocked: Blocked, visible: Any, length: int) -> Bool[Array, "l l"]:
    """Which tokens (columns) each token of an image (rows) may read.

    A token always reads itself: without it, the masked tokens of the first step, when nothing is
    visible, would have nothing to read under `masked_to_masked`.

    Args:
        blocked: the attention that is left out, some.
        visible: how many tokens are visible; they come first.
        length: tokens per image.
    """
    is_visible = jnp.arange(length) < visible
    kinds = {"visible": is_visible, "masked": ~is_visible}
    query, key = blocked.split("_to_")
    return ~(kinds[query][:, None] & kinds[key]) | jnp.eye(length, dtype=bool)
