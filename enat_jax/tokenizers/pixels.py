"""The tokenizer of tiny images without weights: the grey levels of the pixels are the tokens."""

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float, Int, Int32, PyTree

_WHITE = 255


@dataclass(frozen=True)
class Pixels:
    """One token per pixel, out of `codebook_size` evenly spaced greys from black to white.

    `encode(decode(token_ids)) == token_ids` holds exactly, so nothing is lost to the tokenizer
    and a model's picture is exactly what it sampled. Colours become greys. Attributes are those of
    all tokenizers; there are 2 to 256 greys.
    """

    codebook_size: int
    name: str = "pixels"
    patch: int = 1
    digest: str = ""
    params: tuple[()] = ()

    def encode(self, params: PyTree, images: Float[Array, "b y x 3"]) -> Int32[Array, "b n"]:
        """Token ids of the greys nearest to the pixels' mean colour, row by row."""
        greys = jnp.rint(images.mean(axis=-1) * _WHITE).astype(jnp.int32)
        token_ids = ((self.codebook_size - 1) * greys + _WHITE // 2) // _WHITE
        return rearrange(token_ids, "b y x -> b (y x)")

    def decode(
        self, params: PyTree, token_ids: Int[Array, "b n"], grid: tuple[int, int]
    ) -> Float[Array, "b y x 3"]:
        """Images in [0, 1] of the greys that the tokens stand for, in 256 levels."""
        # Whole numbers first, so that a compiled division cannot move a grey by one.
        steps = self.codebook_size - 1
        greys = (_WHITE * token_ids.astype(jnp.int32) + steps // 2) // steps
        y, x = grid
        return repeat(greys / jnp.float32(_WHITE), "b (y x) -> b y x 3", y=y, x=x)
