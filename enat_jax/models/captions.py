"""Captions as networks read them: what a text encoder gives of their tokens, or ids of words."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from enat_jax.models.config import TransformerConfig
from enat_jax.models.layers import Linear, TokenEmbedding, xavier_uniform

# features of an encoder's tokens, or word ids
Text = Float[Array, "b _ t e"] | Int[Array, "b _ t"]


class Captions(NamedTuple):
    """A text condition; all leaves `[b g t e]`, features of tokens, or `[b g t]`, word ids.

    Attributes:
        text: of the captions.
        empty: the same of what stands for "nothing given": the empty caption, or, in sampling, what
            images shall not be.
    """

    text: Any
    empty: Any


def null_captions(condition: Captions) -> Captions:
    """The condition of guidance's other branch."""
    return condition._replace(text=condition.empty)


def condition_shapes(cfg: TransformerConfig, images: int, **options: Any) -> Any:
    """Shapes of the conditions of a batch: class ids, or captions; options as of the shapes."""
    if cfg.condition == "class":
        return jax.ShapeDtypeStruct((images,), jnp.int32, **options)
    text = jax.ShapeDtypeStruct((images, cfg.text_length), jnp.int32, **options)
    if not cfg.text_vocabulary:
        text = jax.ShapeDtypeStruct((*text.shape, cfg.text_width), jnp.float32, **options)
    return Captions(text, text)


def text_projection_flops(cfg: TransformerConfig) -> float:
    """Matrix products of a caption's way to the network's width; none without captions."""
    return 2.0 * cfg.text_length * cfg.text_width * cfg.width


class CaptionEmbedding(nnx.Module):
    """Captions as tokens of a network's width: of an encoder's features, or of a table of words.

    Words of the table have positions; an encoder's features know theirs.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        *,
        rngs: nnx.Rngs,
        kernel_init: nnx.Initializer = xavier_uniform,
    ):
        table = cfg.text_vocabulary, cfg.text_length, cfg.text_width
        self.words = TokenEmbedding(*table, rngs=rngs) if cfg.text_vocabulary else None
        dtype = jnp.dtype(cfg.dtype)
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "kernel_init": kernel_init}
        self.linear = Linear(cfg.text_width, cfg.width, **options)

    def __call__(self, text: Text) -> Float[Array, "b n d"]:
        """The tokens of all captions of a row, one caption after the other."""
        tokens = rearrange(text, "b g t ... -> b (g t) ...")
        if self.words is not None:
            positions = jnp.tile(jnp.arange(text.shape[2]), text.shape[1])
            tokens = self.words(tokens, jnp.broadcast_to(positions, tokens.shape))
        return self.linear(tokens)
