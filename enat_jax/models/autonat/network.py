"""AutoNAT: one Transformer with long skips (U-ViT) that reads all tokens at every step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from enat_jax.core.network import Features, RowPlan, Tokens
from enat_jax.models.attention import attend
from enat_jax.models.autonat.config import AutoNATConfig
from enat_jax.models.captions import CaptionEmbedding, Captions, null_captions
from enat_jax.models.config import Implementation
from enat_jax.models.layers import (
    EMBEDDING_STD,
    UNPLACED,
    Head,
    LayerNorm,
    Linear,
    Mlp,
    TokenEmbedding,
    dropout,
)
from enat_jax.models.rows import Rows
from enat_jax.models.stack import make_stack, run_stack, unstack

EPSILON = 1e-5  # of the norms inside blocks
# the reference cuts the normal distribution at 2, a hundred standard deviations
normal = nnx.initializers.normal(EMBEDDING_STD)


class UViTBlock(nnx.Module):
    """Self-attention and an MLP on normalised inputs; an outer block reads a skip first."""

    def __init__(self, cfg: AutoNATConfig, *, reads_skip: bool, rngs: nnx.Rngs):
        width, dtype = cfg.width, jnp.dtype(cfg.dtype)
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "kernel_init": normal}
        self.num_heads = cfg.num_heads
        self.implementation: Implementation = cfg.attention
        self.skip = Linear(2 * width, width, **options) if reads_skip else None
        self.attention_norm = LayerNorm(width, epsilon=EPSILON)
        # the three on an axis of their own, so that devices can share out the heads
        self.query_key_value = Linear(width, (3, width), use_bias=False, **options)
        self.out = Linear(width, width, **options)
        self.mlp_norm = LayerNorm(width, epsilon=EPSILON)
        self.mlp = Mlp(width, cfg.mlp_ratio, approximate=False, **options)

    def __call__(
        self, x: Float[Array, "b n d"], skip: Float[Array, "b n d"] | None = None
    ) -> Float[Array, "b n d"]:
        """Updates all tokens."""
        if self.skip is not None:
            assert skip is not None
            x = self.skip(jnp.concatenate([x, skip], axis=-1))
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))

    def attention(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """All tokens read all tokens."""
        of_all = self.query_key_value(x)
        q, k, v = rearrange(of_all, "b n r (h c) -> r b n h c", h=self.num_heads)
        y = attend(q, k, v, implementation=self.implementation)
        return self.out(rearrange(y, "b n h c -> b n (h c)"))


class AutoNAT(nnx.Module):
    """The network of AutoNAT (CVPR 2024): a class token and all tokens, masked ones included.

    A condition is the images' class ids, or `Captions`, whose tokens then stand in the place of the
    class token, without position embedding.
    """

    def __init__(self, cfg: AutoNATConfig, *, rngs: nnx.Rngs, placement: Any = UNPLACED):
        self.cfg, self.placement = cfg, placement
        self.embedding = TokenEmbedding(cfg.codebook_size + 1, cfg.length, cfg.width, rngs=rngs)
        if cfg.condition == "text":
            self.caption_embedding = CaptionEmbedding(cfg, rngs=rngs, kernel_init=normal)
        else:
            self.class_embedding = TokenEmbedding(cfg.num_classes + 1, 1, cfg.width, rngs=rngs)

        def block(reads_skip: bool) -> Callable[[nnx.Rngs], UViTBlock]:
            return lambda rngs: UViTBlock(cfg, reads_skip=reads_skip, rngs=rngs)

        self.inward: Any = make_stack(block(False), cfg.depth // 2, rngs=rngs)
        self.middle = block(False)(rngs)
        self.outward: Any = make_stack(block(True), cfg.depth // 2, rngs=rngs)
        self.head = Head(
            cfg.width, cfg.codebook_size, dtype=jnp.dtype(cfg.dtype), rngs=rngs, kernel_init=normal
        )

    def null_condition(self, condition: Any) -> Any:
        """The null class, or the empty captions."""
        if isinstance(condition, Captions):
            return null_captions(condition)
        return jnp.full_like(condition, self.cfg.null_class_id)

    def embed_condition(self, condition: Any) -> Float[Array, "b _ d"]:
        """The class token of each image of a row, or the tokens of its caption."""
        if isinstance(condition, Captions):
            return self.caption_embedding(condition.text)
        return self.class_embedding(condition, jnp.zeros_like(condition)).astype(self.cfg.dtype)

    def __call__(
        self,
        condition: Float[Array, "b _ d"],
        tokens: Tokens,
        row: RowPlan,
        *,
        recalled: Any = None,
        key: jax.Array | None = None,
    ) -> Features:
        """Features of all tokens; images of a row do not read each other.

        Padding costs nothing but rows of the head. Plans have no previous tokens: all visible ones
        are new to every step.
        """
        rows, g = Rows(self.cfg.length, row), len(row.plans)
        masks = jnp.full_like(tokens.masked_positions, self.cfg.mask_id)
        ids, positions = (
            rearrange(rows.together(visible, masked), "b (g l) -> (b g) l", g=g)
            for visible, masked in (
                (tokens.ids, masks),
                (tokens.positions, tokens.masked_positions),
            )
        )
        x = dropout(self.embedding(ids, positions), self.cfg.dropout, key).astype(self.cfg.dtype)
        given = rearrange(condition, "b (g t) d -> (b g) t d", g=g)
        x = self.run(jnp.concatenate([given, x], axis=1))[:, given.shape[1] :]
        return Features(None, *rows.apart(rearrange(x, "(b g) l d -> b (g l) d", g=g)))

    def run(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """All tokens through all blocks, with skips from the inward to the outward half."""

        def apply(block: UViTBlock, x: Array, skip: Array | None) -> Array:
            return self.placement.activations(block(x, skip), "rows")

        remat, place = self.cfg.remat, self.placement
        x, skips = run_stack(self.inward, x, None, apply, place, remat=remat, keep=True)
        x = apply(place.block(self.middle), x, None)
        last_first = skips[::-1] if isinstance(skips, list) else skips[:, ::-1]
        return run_stack(self.outward, x, last_first, apply, place, remat=remat)

    def logits(self, features: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Scores over the codebook, float32."""
        return self.head(features, self.embedding.word[...])

    def initial_memory(self, batch: int, capacity: int) -> tuple[()]:
        """Nothing is carried from step to step."""
        return ()

    def predict(
        self, condition: Float[Array, "b _ d"], memory: tuple[()], tokens: Tokens, row: RowPlan
    ) -> tuple[Float[Array, "b m v"], tuple[()]]:
        """Logits of the masked tokens."""
        return self.logits(self(condition, tokens, row).masked), memory

    def recall(self, condition: Float[Array, "b _ d"], tokens: Tokens, row: RowPlan) -> None:
        """Nothing: every step reads all tokens anew."""

    def unstacked(self) -> "AutoNAT":
        """The same network with every block's weights in arrays of their own."""
        model = nnx.merge(*nnx.split(self))
        model.inward, model.outward = unstack(self.inward), unstack(self.outward)
        return model
