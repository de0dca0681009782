"""Self-cross attention: queries read context tokens and each other in one softmax."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from enat_jax.models.config import Implementation
from enat_jax.models.layers import Linear

Valid = Sequence[Bool[Array, "... k"]]
"""Per image of a row, which tokens its queries may read: all of them (`[k]`) or each (`[n k]`)."""


def attend(
    q: Float[Array, "b n h c"],
    k: Float[Array, "b m h c"],
    v: Float[Array, "b m h c"],
    *,
    valid: Bool[Array, "... m"] | None = None,
    implementation: Implementation = "xla",
) -> Float[Array, "b n h c"]:
    """Softmax attention with scale `c ** -0.5`; the softmax is in float32.

    Args:
        q: queries.
        k: keys.
        v: values.
        valid: which keys may be read, by all queries (`[m]`) or by each (`[n m]`); None for all.
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


def split_images(
    x: Float[Array, "b n h c"], blocks: Sequence[Sequence[int]]
) -> list[list[Float[Array, "b k h c"]]]:
    """Cuts an axis made of blocks, each block image after image, into the parts of each image.

    One split instead of many slices: its backward pass is one concatenation.

    Args:
        x: the tokens.
        blocks: per block, the number of tokens of each image.

    Returns:
        Per image, its part of each block; empty parts are left out.
    """
    counts = [count for block in blocks for count in block]
    images = len(blocks[0])
    parts: list[list[Array]] = [[] for _ in range(images)]
    for index, part in enumerate(jax.lax.split(x, counts, axis=1)):
        if part.shape[1]:
            parts[index % images].append(part)
    return parts


class SelfCrossAttention(nnx.Module):
    """SC-attention (ENAT section 4.1): keys and values of context and own tokens side by side.

    Context and own tokens have key/value projections of their own; queries come from own tokens.
    With one of the two alone it is a cross- or a self-attention.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        dtype: jnp.dtype,
        implementation: Implementation,
        rngs: nnx.Rngs,
        reads_own: bool = True,
        reads_context: bool = True,
    ):
        def key_value() -> Linear:  # on an axis of their own, so that devices can share out heads
            return Linear(width, (2, width), dtype=dtype, rngs=rngs)

        self.num_heads = num_heads
        self.implementation: Implementation = implementation
        self.query = Linear(width, width, dtype=dtype, rngs=rngs)
        self.context_key_value = key_value() if reads_context else None
        self.own_key_value = key_value() if reads_own else None
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        own: Float[Array, "b n d"],
        context: Float[Array, "b m d"] | None,
        *,
        own_counts: Sequence[int],
        context_blocks: Sequence[Sequence[int]] = (),
        valid: Valid | None = None,
    ) -> Float[Array, "b n d"]:
        """Attends within each image of a row; where there is nothing to read, the result is 0.

        Args:
            own: the tokens that ask and are read, image after image.
            context: the tokens that are only read, blocks of images; None where there are none.
            own_counts: own tokens of each image in the row.
            context_blocks: per block of the context, the tokens of each image.
            valid: which of an image's context and own tokens (in this order) may be read.
        """
        sources: list[tuple[Array, Sequence[Sequence[int]]]] = []
        if self.own_key_value is not None:
            sources.append((self.own_key_value(own), [own_counts]))
        if context is not None and self.context_key_value is not None:
            sources.insert(0, (self.context_key_value(context), context_blocks))
        keys: list[list[Array]] = [[] for _ in own_counts]
        values: list[list[Array]] = [[] for _ in own_counts]
        for key_value, blocks in sources:
            for parts, whole in zip((keys, values), jnp.split(key_value, 2, axis=2), strict=True):
                for image, found in enumerate(split_images(self._heads(whole[:, :, 0]), blocks)):
                    parts[image] += found
        queries = split_images(self._heads(self.query(own)), [own_counts])
        masks = [None] * len(queries) if valid is None else valid
        out = [
            attend(
                q[0],
                _concatenate(k),
                _concatenate(v),
                valid=mask,
                implementation=self.implementation,
            )
            if k
            else jnp.zeros_like(q[0])
            for q, k, v, mask in zip(queries, keys, values, masks, strict=True)
            if q
        ]
        y = self.out(rearrange(_concatenate(out), "b n h c -> b n (h c)"))
        if self.own_key_value is None:  # a token that reads itself always has something to read
            anything = [
                jnp.full(count, bool(k)) & (True if mask is None else jnp.any(mask))
                for count, k, mask in zip(own_counts, keys, masks, strict=True)
            ]
            y = jnp.where(jnp.concatenate(anything)[:, None], y, 0)
        return y

    def _heads(self, x: Float[Array, "b n d"]) -> Float[Array, "b n h c"]:
        return rearrange(x, "b n (h c) -> b n h c", h=self.num_heads)


def _concatenate(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
