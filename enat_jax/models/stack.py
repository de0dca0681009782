"""A stack of equal blocks, run as a scan over depth or as a plain loop."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

Remat = Literal["none", "block", "dots"]
Block = TypeVar("Block", bound=nnx.Module)


def make_stack(make_block: Callable[[nnx.Rngs], Block], depth: int, *, rngs: nnx.Rngs) -> Block:
    """Builds `depth` blocks with every parameter stacked along a new first axis."""
    return nnx.vmap(make_block)(rngs.split(depth))


def run_stack(
    blocks: Any,
    x: Array,
    per_block: Any,
    apply: Callable[[Any, Array, Any], Array],
    *,
    remat: Remat = "none",
) -> Array:
    """Runs `x = apply(block, x, inputs)` over the blocks.

    Args:
        blocks: one module with stacked parameters (a scan: compile time does not grow with depth),
            or an `nnx.List` of modules (a loop: no copy of a layer's weights out of the stack).
        x: what the first block reads.
        per_block: what `map_stack` returned for these blocks.
        apply: one block.
        remat: what the backward pass recomputes: nothing, whole blocks, or all but matrix products.
    """
    policies = {"block": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    if remat != "none":
        apply = jax.checkpoint(apply, policy=policies[remat])
    if isinstance(blocks, nnx.List):
        for block, inputs in zip(blocks, per_block, strict=True):
            x = apply(block, x, inputs)
        return x
    inputs = jnp.moveaxis(per_block, 1, 0)
    x, _ = jax.lax.scan(lambda x, item: (apply(item[0], x, item[1]), None), x, (blocks, inputs))
    return x


def map_stack(blocks: Any, apply: Callable[[Any], Array]) -> Any:
    """Applies a function to every block; a list, or an array whose second axis is the depth."""
    if isinstance(blocks, nnx.List):
        return [apply(block) for block in blocks]
    return jax.vmap(apply, out_axes=1)(blocks)


def unstack(blocks: Any) -> nnx.List:
    """Turns a stack into a list of blocks with arrays of their own."""
    graphdef, state = nnx.split(blocks)
    depth = jax.tree.leaves(state)[0].shape[0]
    return nnx.List(
        [nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], state)) for i in range(depth)]
    )
