"""Rows in which each image's visible and masked tokens lie together."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from enat_jax.core.network import RowPlan


@dataclass(frozen=True)
class Rows:
    """How rows are laid out: image after image, its visible tokens and then its masked ones.

    Attributes:
        length: tokens per image.
        row: the (padded) plans of its images, none of whose tokens is `previous`. Padding is left
            out of the rows, so that it costs a network nothing.
    """

    length: int
    row: RowPlan

    def together(
        self, visible: Shaped[Array, "b n ..."], masked: Shaped[Array, "b m ..."]
    ) -> Shaped[Array, "b l ..."]:
        """Rows of all tokens, from the visible ones of all images and the masked ones of all."""
        if self.row.counts is None:
            parts = zip(
                jax.lax.split(visible, self.row.new, axis=1),
                jax.lax.split(masked, self.row.masked, axis=1),
                strict=True,
            )
            return jnp.concatenate([part for pair in parts for part in pair], axis=1)
        visible_count, place = self.row.counts.new, jnp.arange(self.length)
        padding = self.row.plans[0].new - visible_count
        index = jnp.where(place < visible_count, place, place + padding)
        return jnp.concatenate([visible, masked], axis=1)[:, index]

    def apart(
        self, rows: Shaped[Array, "b l ..."]
    ) -> tuple[Shaped[Array, "b n ..."], Shaped[Array, "b m ..."]]:
        """The visible tokens of all images, and the masked ones, with anything in the padding."""
        if self.row.counts is None:
            counts = [count for plan in self.row.plans for count in (plan.new, plan.masked)]
            parts = jax.lax.split(rows, counts, axis=1)
            return jnp.concatenate(parts[::2], axis=1), jnp.concatenate(parts[1::2], axis=1)
        (shape,), last = self.row.plans, self.length - 1
        visible = jnp.minimum(jnp.arange(shape.new), last)
        masked = jnp.minimum(self.row.counts.new + jnp.arange(shape.masked), last)
        return rows[:, visible], rows[:, masked]
