"""A stack of equal blocks, run as a scan over depth or as a plain loop."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from enat_jax.models.config import Remat
from enat_jax.models.layers import LINEAR, UNPLACED

Block = TypeVar("Block", bound=nnx.Module)


def make_stack(make_block: Callable[[nnx.Rngs], Block], depth: int, *, rngs: nnx.Rngs) -> Block:
    """Builds `depth` blocks with every parameter stacked along a new first axis."""
    return nnx.vmap(make_block)(rngs.split(depth))


def run_stack(
    blocks: Any,
    x: Array,
    per_block: Any,
    apply: Callable[[Any, Array, Any], Array],
    placement: Any = UNPLACED,
    *,
    remat: Remat = "none",
    keep: bool = False,
) -> Any:
    """Runs `x = apply(block, x, inputs)` over the blocks.

    Args:
        blocks: one module with stacked parameters (a scan: compile time does not grow with depth),
            or an `nnx.List` of modules (a loop: no copy of a layer's weights out of the stack).
        x: what the first block reads.
        per_block: what `map_stack` returned for these blocks, a tree of such arrays, or None.
        apply: one block.
        placement: of a block where it is used.
        remat: what the backward pass recomputes: nothing, whole blocks, or all but what
            linear layers return.
        keep: also returns what every block gave, as `map_stack` would.
    """
    policies = {"block": None, "dots": jax.checkpoint_policies.save_only_these_names(LINEAR)}

    def placed(block: Any, x: Array, inputs: Any) -> Array:
        return apply(placement.block(block), x, inputs)

    # Placing is done again in the backward pass, too: weights are kept as they lie in the stack.
    run = placed if remat == "none" else jax.checkpoint(placed, policy=policies[remat])
    if isinstance(blocks, nnx.List):
        given = []
        for number, block in enumerate(blocks):
            x = run(block, x, None if per_block is None else per_block[number])
            given.append(x)
        return (x, given) if keep else x
    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), per_block)

    def body(x: Array, item: tuple[Any, Any]) -> tuple[Array, Any]:
        x = run(item[0], x, item[1])
        return x, x if keep else None

    x, given = jax.lax.scan(body, x, (blocks, inputs))
    return (x, jnp.moveaxis(given, 0, 1)) if keep else x


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
