"""A function of a batch, a few items of every device at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from enat_jax.parallel.placement import batch_shards


def map_in_chunks(function: Callable[[Any], Any], batch: Array, mesh: Mesh, at_once: int) -> PyTree:
    """Applies a function of a batch to a few items of every device at a time.

    It saves memory; and since a device always meets the same number of items, filled up with
    zeros at the end, an item's result does not depend on the size of the batch.

    Args:
        function: of arrays with the items along the first axis, to a tree of such arrays.
        batch: its first axis lies as `batch_sharding` says.
        mesh: the devices.
        at_once: items of a device in a call of the function.
    """
    shards = batch_shards(mesh)
    local = len(batch) // shards

    def some(part: Array) -> PyTree:
        made = function(rearrange(part, "s b ... -> (s b) ..."))
        return jax.tree.map(lambda x: rearrange(x, "(s b) ... -> s b ...", s=shards), made)

    # devices hold neighbouring items: each chunk takes some of every device's
    rows = rearrange(batch, "(s l) ... -> s l ...", s=shards)
    filled = jnp.pad(rows, [(0, 0), (0, -local % at_once)] + [(0, 0)] * (rows.ndim - 2))
    parts = rearrange(filled, "s (m b) ... -> m s b ...", b=at_once)
    made = jax.lax.map(some, parts)

    def joined(x: Array) -> Array:
        rows = rearrange(x, "m s b ... -> s (m b) ...")[:, :local]
        return rearrange(rows, "s l ... -> (s l) ...")

    return jax.tree.map(joined, made)
