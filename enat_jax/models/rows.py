"""Rows in which each image's visible and masked tokens lie together."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from enat_jax.core.plans import Plan


@dataclass(frozen=True)
class Rows:
    """How rows are laid out: image after image, its visible tokens and then its masked ones.

    Attributes:
        length: tokens per image.
        plans: the (padded) plan of each image in a row; no token is `previous`.
        counts: traced counts within the padded plan, of rows of one image. The padding is left out
            of the rows, so that it costs a network nothing.
    """

    length: int
    plans: Sequence[Plan]
    counts: Plan | None = None

    def together(
        self, visible: Shaped[Array, "b n ..."], masked: Shaped[Array, "b m ..."]
    ) -> Shaped[Array, "b l ..."]:
        """Rows of all tokens, from the visible ones of all images and the masked ones of all."""
        if self.counts is None:
            parts = zip(
                jax.lax.split(visible, [plan.new for plan in self.plans], axis=1),
                jax.lax.split(masked, [plan.masked for plan in self.plans], axis=1),
                strict=True,
            )
            return jnp.concatenate([part for pair in parts for part in pair], axis=1)
        place, padding = jnp.arange(self.length), self.plans[0].new - self.counts.new
        index = jnp.where(place < self.counts.new, place, place + padding)
        return jnp.concatenate([visible, masked], axis=1)[:, index]

    def apart(
        self, rows: Shaped[Array, "b l ..."]
    ) -> tuple[Shaped[Array, "b n ..."], Shaped[Array, "b m ..."]]:
        """The visible tokens of all images, and the masked ones, with anything in the padding."""
        if self.counts is None:
            counts = [count for plan in self.plans for count in (plan.new, plan.masked)]
            parts = jax.lax.split(rows, counts, axis=1)
            return jnp.concatenate(parts[::2], axis=1), jnp.concatenate(parts[1::2], axis=1)
        (shape,), last = self.plans, self.length - 1
        visible = jnp.minimum(jnp.arange(shape.new), last)
        masked = jnp.minimum(self.counts.new + jnp.arange(shape.masked), last)
        return rows[:, visible], rows[:, masked]
