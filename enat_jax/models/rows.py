"""Rows in which each image's visible and masked tokens lie together."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

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
        pairs = zip(
            jax.lax.split(visible, self.row.new, axis=1),
            jax.lax.split(masked, self.row.masked, axis=1),
            strict=True,
        )
        images = [jnp.concatenate(pair, axis=1) for pair in pairs]
        if self.row.counts is not None:
            place = jnp.arange(self.length)
            for image, (plan, drawn) in enumerate(
                zip(self.row.plans, self.row.counts, strict=True)
            ):
                count = jnp.reshape(drawn.new, (-1, 1))
                index = jnp.where(place < count, place, place + plan.new - count)
                if sum(plan):
                    images[image] = _take(images[image], index)
        return jnp.concatenate(images, axis=1)

    def apart(
        self, rows: Shaped[Array, "b l ..."]
    ) -> tuple[Shaped[Array, "b n ..."], Shaped[Array, "b m ..."]]:
        """The visible tokens of all images, and the masked ones, with anything in the padding."""
        if self.row.counts is None:
            counts = [count for plan in self.row.plans for count in (plan.new, plan.masked)]
            parts = jax.lax.split(rows, counts, axis=1)
            return jnp.concatenate(parts[::2], axis=1), jnp.concatenate(parts[1::2], axis=1)
        visible, masked, last = [], [], self.length - 1
        images = jnp.split(rows, len(self.row.plans), axis=1)
        for image, plan, drawn in zip(images, self.row.plans, self.row.counts, strict=True):
            start = jnp.reshape(drawn.new, (-1, 1))
            visible.append(image[:, jnp.minimum(jnp.arange(plan.new), last)])
            masked.append(_take(image, jnp.minimum(start + jnp.arange(plan.masked), last)))
        return jnp.concatenate(visible, axis=1), jnp.concatenate(masked, axis=1)


def _take(x: Shaped[Array, "b n ..."], index: Int[Array, "#b k"]) -> Shaped[Array, "b k ..."]:
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
