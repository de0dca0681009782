"""Self-cross attention: queries read context tokens and each other in one softmax."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from enat_jax.models.config import Implementation
from enat_jax.models.layers import Linear


class Segments(NamedTuple):
    """Whose tokens are whose in a row, along own tokens and along context.

    Attributes:
        own: own tokens of each image.
        context: per block of context, the tokens of each image.
        valid: per image, which of its context and own tokens (in this order) its queries may read,
            in every row or in each, all queries or each; None for all.
    """

    own: Sequence[int]
    context: Sequence[Sequence[int]] = ()
    valid: Sequence[Bool[Array, "#b 1 #n k"]] | None = None


def attend(
    q: Float[Array, "b n h c"],
    k: Float[Array, "b m h c"],
    v: Float[Array, "b m h c"],
    *,
    valid: Bool[Array, "#b 1 #n m"] | None = None,
    implementation: Implementation = "xla",
) -> Float[Array, "b n h c"]:
    """Softmax attention with scale `c ** -0.5`; the softmax is in float32.

    Keys that are `valid` may be read, by all queries or by each. `cudnn` is NVIDIA's fused
    kernel (16-bit types, head sizes that are multiples of 8); it takes no such mask, so that masked
    keys fall back on `xla`.
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


class SelfCrossAttention(nnx.Module):
    """SC-attention (ENAT section 4.1): keys and values of context and own tokens side by side.

    Own tokens, image after image, ask and are read; context, in blocks of images, is only read.
    Each of the two has a key/value projection, or they share one; with one alone it is a cross- or
    a self-attention.
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
        shares_key_value: bool = False,
    ):
        def key_value() -> Linear:  # on an axis of their own, so that devices can share out heads
            return Linear(width, (2, width), dtype=dtype, rngs=rngs)

        self.num_heads = num_heads
        self.implementation: Implementation = implementation
        self.query = Linear(width, width, dtype=dtype, rngs=rngs)
        self.reads_context = reads_context
        own_for_both = shares_key_value and reads_own
        self.context_key_value = key_value() if reads_context and not own_for_both else None
        self.own_key_value = key_value() if reads_own else None
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        own: Float[Array, "b n d"],
        context: Float[Array, "b m d"] | None,
        segments: Segments,
    ) -> Float[Array, "b n d"]:
        """Attends within each image of a row; where there is nothing to read, values are 0."""
        sources: list[tuple[Array, Sequence[Sequence[int]]]] = []
        if context is not None and self.reads_context:
            key_value: Any = self.context_key_value or self.own_key_value
            sources.append((key_value(context), segments.context))
        if self.own_key_value is not None:
            sources.append((self.own_key_value(own), [segments.own]))
        read: list[list[list[Array]]] = [[[] for _ in segments.own] for _ in ("keys", "values")]
        for key_value, blocks in sources:
            for of_images, x in zip(read, jnp.unstack(key_value, axis=2), strict=True):
                for of_image, parts in zip(of_images, self._images(x, blocks), strict=True):
                    of_image += parts
        out = []
        queries = self._images(self.query(own), [segments.own])
        if segments.valid is not None and len(queries) > 1:
            return self._join(self._attend_padded(queries, read[0], read[1], segments.valid))
        for image, (q, k, v) in enumerate(zip(queries, *read, strict=True)):
            if q and k:
                k, v = jnp.concatenate(k, axis=1), jnp.concatenate(v, axis=1)
                valid = None if segments.valid is None else segments.valid[image]
                out.append(attend(q[0], k, v, valid=valid, implementation=self.implementation))
            elif q:
                out.append(jnp.zeros_like(q[0]))
        return self._join(out)

    def _join(self, images: list[Float[Array, "b _ h c"]]) -> Float[Array, "b n d"]:
        return self.out(rearrange(jnp.concatenate(images, axis=1), "b n h c -> b n (h c)"))

    def _attend_padded(
        self,
        queries: list[list[Array]],
        keys: list[list[Array]],
        values: list[list[Array]],
        valid: Sequence[Bool[Array, "#b 1 #n _"]],
    ) -> list[Float[Array, "b _ h c"]]:
        """Attends within all images at once, each padded to the longest: quicker to compile."""

        def padded(images: list[list[Array]]) -> Float[Array, "b g k h c"]:
            size = max(sum(part.shape[1] for part in parts) for parts in images)
            empty = jnp.zeros_like(next(parts[0] for parts in images if parts)[:, :0])
            longest = [jnp.concatenate([empty, *parts], axis=1) for parts in images]
            return jnp.stack([jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0)))
                              for x in longest], axis=1)  # fmt: skip

        q, k, v = padded(queries), padded(keys), padded(values)
        exist = [jnp.pad(x, ((0, 0),) * 3 + ((0, k.shape[2] - x.shape[3]),)) for x in valid]
        every = jax.vmap(lambda q, k, v, x: attend(q, k, v, valid=x), in_axes=1, out_axes=1)
        out = every(q, k, v, jnp.stack(exist, axis=1))
        return [out[:, i, : parts[0].shape[1]] for i, parts in enumerate(queries) if parts]

    def _images(
        self, x: Float[Array, "b n d"], blocks: Sequence[Sequence[int]]
    ) -> list[list[Float[Array, "b k h c"]]]:
        """Cuts an axis made of blocks, each image after image, into each image's parts not empty.

        One split instead of many slices: its backward pass is one concatenation.
        """
        heads = rearrange(x, "b n (h c) -> b n h c", h=self.num_heads)
        parts = jax.lax.split(heads, [count for block in blocks for count in block], axis=1)
        images = len(blocks[0])
        return [[x for x in parts[i::images] if x.shape[1]] for i in range(images)]
