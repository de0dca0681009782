"""Self-cross attention: queries read context tokens and each other in one softmax."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from enat_jax.models.layers import Linear

Implementation = Literal["xla", "cudnn"]


def attend(
    q: Float[Array, "b n h c"],
    k: Float[Array, "b m h c"],
    v: Float[Array, "b m h c"],
    *,
    valid: Bool[Array, " m"] | None = None,
    implementation: Implementation = "xla",
) -> Float[Array, "b n h c"]:
    """Softmax attention with scale `c ** -0.5`; the softmax is in float32.

    Args:
        q: queries.
        k: keys.
        v: values.
        valid: which keys may be read, None for all of them.
        implementation: `xla`, or `cudnn` for NVIDIA's fused kernel (16-bit types, head sizes that
            are multiples of 8); where keys are masked, `cudnn` falls back on `xla`, because it
            takes no such mask.
    """
    if implementation == "cudnn" and valid is None:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    logits = jnp.einsum("bnhc,bmhc->bhnm", q, k, preferred_element_type=jnp.float32)
    logits *= q.shape[-1] ** -0.5
    if valid is not None:  # finite, so that a row without any valid key stays finite too
        logits = jnp.where(valid, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhnm,bmhc->bnhc", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)


def image_slices(blocks: Sequence[Sequence[int]]) -> list[list[slice]]:
    """Where each image's tokens lie in an axis made of blocks, each block image after image.

    Args:
        blocks: per block, the number of tokens of each image.

    Returns:
        Per image, one slice a block; empty ones are left out.
    """
    slices: list[list[slice]] = [[] for _ in blocks[0]]
    start = 0
    for block in blocks:
        for image, count in enumerate(block):
            if count:
                slices[image].append(slice(start, start + count))
            start += count
    return slices


class SelfCrossAttention(nnx.Module):
    """SC-attention (ENAT section 4.1): keys and values of context and own tokens side by side.

    Context and own tokens have key/value projections of their own; queries come from own tokens.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        dtype: jnp.dtype,
        implementation: Implementation,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.implementation: Implementation = implementation
        self.query = Linear(width, width, dtype=dtype, rngs=rngs)
        self.context_key_value = Linear(width, 2 * width, dtype=dtype, rngs=rngs)
        self.own_key_value = Linear(width, 2 * width, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        own: Float[Array, "b n d"],
        context: Float[Array, "b m d"] | None,
        *,
        own_counts: Sequence[int],
        context_blocks: Sequence[Sequence[int]] = (),
        valid: Bool[Array, " k"] | None = None,
    ) -> Float[Array, "b n d"]:
        """Attends within each image of a row.

        Args:
            own: the tokens that ask and are read, image after image.
            context: the tokens that are only read, blocks of images; None where there are none.
            own_counts: own tokens of each image in the row.
            context_blocks: per block of the context, the tokens of each image.
            valid: which of context and own tokens (in this order) exist; rows of one image only.
        """
        h = self.num_heads
        q = rearrange(self.query(own), "b n (h c) -> b n h c", h=h)
        k, v = rearrange(self.own_key_value(own), "b n (r h c) -> r b n h c", r=2, h=h)
        sources = [(k, v, image_slices([own_counts]))]
        if context is not None:
            k, v = rearrange(self.context_key_value(context), "b m (r h c) -> r b m h c", r=2, h=h)
            sources.insert(0, (k, v, image_slices(context_blocks)))

        rows = []
        for image, (queries,) in enumerate(_or_empty(image_slices([own_counts]))):
            if queries.start == queries.stop:
                continue
            keys = [k[:, part] for k, _, where in sources for part in where[image]]
            values = [v[:, part] for _, v, where in sources for part in where[image]]
            rows.append(
                attend(
                    q[:, queries],
                    _concatenate(keys),
                    _concatenate(values),
                    valid=valid,
                    implementation=self.implementation,
                )
            )
        return self.out(rearrange(_concatenate(rows), "b n h c -> b n (h c)"))


def _or_empty(slices: list[list[slice]]) -> list[list[slice]]:
    return [parts or [slice(0, 0)] for parts in slices]


def _concatenate(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
