"""The paper's baseline NAT: all tokens in one stack, reading each other (ENAT, table 1)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from enat_jax.core.network import Features, RowPlan, Tokens
from enat_jax.models.attention import Segments
from enat_jax.models.enat.config import Blocked
from enat_jax.models.enat.network import ENAT, EmbeddedCondition
from enat_jax.models.rows import Rows


class SharedStackNAT(ENAT):
    """ENAT's encoder on all tokens, masked ones included; nothing is carried between steps."""

    def __call__(
        self,
        condition: EmbeddedCondition,
        tokens: Tokens,
        row: RowPlan,
        *,
        recalled: Any = None,
        key: jax.Array | None = None,
    ) -> Features:
        """Features of all tokens, from one stack."""
        length, blocked = self.cfg.length, self.cfg.blocked
        rows = Rows(length, row)
        masks = jnp.full_like(tokens.masked_positions, self.cfg.mask_id)
        positions = rows.together(tokens.positions, tokens.masked_positions)
        x = self.embed(rows.together(tokens.ids, masks), positions, key)
        valid = None
        if blocked != "none":
            plans = row.counts or row.plans
            valid = [readable(blocked, jnp.asarray(plan.new), length) for plan in plans]
        segments = Segments([length] * len(row.plans), valid=valid)
        x = self.run(self.encoder, x, condition.encoder, None, segments)
        return Features(None, *rows.apart(x))


def readable(
    blocked: Blocked, visible: Int[Array, "*b"], length: int
) -> Bool[Array, "_ 1 {length} {length}"]:
    """Which tokens (columns) each token of an image (rows) may read.

    A token always reads itself: without it, the masked tokens of the first step, when nothing is
    visible, would have nothing to read under `masked_to_masked`.

    Args:
        blocked: the attention that is left out, some.
        visible: how many tokens are visible, in every row or in each; they come first.
        length: tokens per image.
    """
    is_visible = jnp.arange(length) < visible.reshape(-1, 1, 1)
    kinds = {"visible": is_visible, "masked": ~is_visible}
    query, key = blocked.split("_to_")
    blocks = kinds[query][..., None] & kinds[key][..., None, :]
    return ~blocks | jnp.eye(length, dtype=bool)
