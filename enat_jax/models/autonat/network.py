"""AutoNAT: one Transformer with long skips (U-ViT) that reads all tokens at every step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from enat_jax.core.plans import Plan
from enat_jax.models.attention import Implementation, attend
from enat_jax.models.head import Head
from enat_jax.models.layers import (
    EMBEDDING_STD,
    UNPLACED,
    LayerNorm,
    Linear,
    Mlp,
    TokenEmbedding,
    dropout,
)
from enat_jax.models.rows import Rows
from enat_jax.models.stack import Remat, make_stack, run_stack, unstack

EPSILON = 1e-5  # of the norms inside blocks
# the reference cuts the normal distribution at 2, a hundred standard deviations
normal = nnx.initializers.normal(EMBEDDING_STD)


@dataclass(frozen=True)
class AutoNATConfig:
    """Sizes of AutoNAT and how it computes; AutoNAT-L's by default.

    Attributes:
        name: which network this is.
        length: tokens per image.
        codebook_size: number of discrete codes; also the mask token's id.
        num_classes: number of classes; also the null class's id.
        width: features per token.
        num_heads: attention heads; divides `width`.
        depth: blocks beside the middle one, an even number: half of them hand skips to the others.
        mlp_ratio: hidden width of the MLPs over `width`.
        dropout: rate on the tokens' embeddings, in training only.
        dtype: type of activations and matrix operands; parameters stay float32.
        attention: implementation of attention.
        remat: what the backward pass recomputes.
    """

    name: Literal["autonat"] = "autonat"
    length: int = 256
    codebook_size: int = 1024
    num_classes: int = 1000
    width: int = 768
    num_heads: int = 8
    depth: int = 24
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Implementation = "xla"
    remat: Remat = "none"

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked token."""
        return self.codebook_size

    @property
    def carries_features(self) -> bool:
        """Whether a step can read what earlier steps computed."""
        return False

    @property
    def carries_masked_features(self) -> bool:
        """Whether a step reads what the one before computed of tokens then masked."""
        return False

    @property
    def null_class_id(self) -> int:
        """The class of the unconditional branch."""
        return self.num_classes


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

    Args:
        cfg: sizes.
        rngs: keys of the initialisation.
        placement: where blocks and activations lie.
    """

    def __init__(
        self,
        cfg: AutoNATConfig,
        *,
        rngs: nnx.Rngs,
        placement: Any = UNPLACED,
    ):
        self.cfg = cfg
        self.placement = placement
        self.embedding = TokenEmbedding(cfg.codebook_size + 1, cfg.length, cfg.width, rngs=rngs)
        self.class_embedding = TokenEmbedding(cfg.num_classes + 1, 1, cfg.width, rngs=rngs)

        def block(reads_skip: bool) -> Callable[[nnx.Rngs], UViTBlock]:
            return lambda rngs: UViTBlock(cfg, reads_skip=reads_skip, rngs=rngs)

        self.inward: Any = make_stack(block(False), cfg.depth // 2, rngs=rngs)
        self.middle = block(False)(rngs)
        self.outward: Any = make_stack(block(True), cfg.depth // 2, rngs=rngs)
        self.head = Head(
            cfg.width, cfg.codebook_size, dtype=jnp.dtype(cfg.dtype), rngs=rngs, kernel_init=normal
        )

    def embed_class(self, class_ids: Int[Array, " b"]) -> Float[Array, "b 1 d"]:
        """The class token."""
        class_ids = class_ids[:, None]
        return self.class_embedding(class_ids, jnp.zeros_like(class_ids)).astype(self.cfg.dtype)

    def __call__(
        self,
        class_token: Float[Array, "b 1 d"],
        token_ids: Int[Array, "b n"],
        positions: Int[Array, "b n"],
        *,
        key: jax.Array | None = None,
    ) -> Float[Array, "b n d"]:
        """Features of all tokens, in the order they are given in.

        Args:
            class_token: from `embed_class`.
            token_ids: ids, the mask's among them.
            positions: their positions, in any order.
            key: turns dropout on.
        """
        x = dropout(self.embedding(token_ids, positions), self.cfg.dropout, key)
        x = jnp.concatenate([class_token, x.astype(self.cfg.dtype)], axis=1)

        def apply(block: UViTBlock, x: Array, skip: Array | None) -> Array:
            return self.placement.activations(block(x, skip), "rows")

        remat, place = self.cfg.remat, self.placement
        x, skips = run_stack(self.inward, x, None, apply, place, remat=remat, keep=True)
        x = apply(place.block(self.middle), x, None)
        last_first = skips[::-1] if isinstance(skips, list) else skips[:, ::-1]
        x = run_stack(self.outward, x, last_first, apply, place, remat=remat)
        return x[:, 1:]

    def logits(self, features: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Scores over the codebook, float32."""
        return self.head(features, self.embedding.word[...])

    # What training asks of a network (`training_step.Network`).

    def remember(
        self,
        class_ids: Int[Array, "b g"],
        token_ids: Int[Array, "b p"],
        positions: Int[Array, "b p"],
        hidden_positions: Int[Array, "b h"],
        plans: Sequence[Plan],
    ) -> None:
        """Nothing: every step reads all tokens anew."""

    def train_logits(
        self,
        class_ids: Int[Array, "b g"],
        token_ids: Int[Array, "b n"],
        positions: Int[Array, "b n"],
        masked_positions: Int[Array, "b m"],
        plans: Sequence[Plan],
        *,
        features: None = None,
        key: jax.Array | None,
    ) -> Float[Array, "b m v"]:
        """Logits of a row's masked tokens; images of a row do not read each other."""
        masks = jnp.full_like(masked_positions, self.cfg.mask_id)
        rows, g = Rows(self.cfg.length, plans), len(plans)
        ids, where = (
            rearrange(rows.together(visible, masked), "b (g l) -> (b g) l", g=g)
            for visible, masked in ((token_ids, masks), (positions, masked_positions))
        )
        x = self(self.embed_class(rearrange(class_ids, "b g -> (b g)")), ids, where, key=key)
        _, masked = rows.apart(rearrange(x, "(b g) l d -> b (g l) d", g=g))
        return self.logits(masked)

    # What the generation loop asks of a network (`generate.Network`).

    def condition(self, class_ids: Int[Array, " b"]) -> Float[Array, "b 1 d"]:
        """The class token."""
        return self.embed_class(class_ids)

    def initial_state(self, batch: int, capacity: int) -> tuple[()]:
        """Nothing is carried from step to step."""
        return ()

    def predict(
        self,
        condition: Float[Array, "b 1 d"],
        state: tuple[()],
        token_ids: Int[Array, "b n"],
        positions: Int[Array, "b n"],
        masked_positions: Int[Array, "b m"],
        shape: Plan,
        counts: Plan | None,
    ) -> tuple[Float[Array, "b m v"], tuple[()]]:
        """Logits of the masked tokens; padding costs nothing but rows of the head.

        Plans have no previous tokens: all visible ones are new to every step.
        """
        assert shape.previous == 0
        rows = Rows(self.cfg.length, [shape], counts)
        masks = jnp.full_like(masked_positions, self.cfg.mask_id)
        ids, where = rows.together(token_ids, masks), rows.together(positions, masked_positions)
        _, masked = rows.apart(self(condition, ids, where))
        return self.logits(masked), state

    def unstacked(self) -> "AutoNAT":
        """The same network with every block's weights in arrays of their own."""
        graphdef, params = nnx.split(self)
        model = nnx.merge(graphdef, params)
        model.inward, model.outward = unstack(self.inward), unstack(self.outward)
        return model
