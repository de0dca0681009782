"""The identity tokenizer for tiny images: the grey levels of the pixels are the tokens."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax import Array
from jaxtyping import Int, Int32, UInt8

_WHITE = 255


@dataclass(frozen=True)
class Pixels:
    """One token per pixel, out of `levels` evenly spaced greys from black to white.

    `encode(decode(token_ids)) == token_ids` holds exactly, so nothing is lost to the tokenizer
    and a model's picture is exactly what it sampled.

    Attributes:
        levels: Number of greys, in [2, 256].
        grid: Rows and columns of the images.
    """

    name: ClassVar[str] = "pixels"

    levels: int = 17
    grid: tuple[int, int] = (8, 8)

    def __post_init__(self):
        if not 2 <= self.levels <= _WHITE + 1:
            raise ValueError(f"levels = {self.levels}, must lie in [2, {_WHITE + 1}]")

    @property
    def codebook_size(self) -> int:
        """Number of distinct token ids."""
        return self.levels

    def encode(self, images: UInt8[Array | np.ndarray, "b y x 1"]) -> Int32[Array, "b n"]:
        """Token ids of the greys nearest to the pixels, row by row from the top left."""
        y, x = self.grid
        greys = rearrange(jnp.asarray(images, jnp.int32), "b y x 1 -> b (y x)", y=y, x=x)
        return ((self.levels - 1) * greys + _WHITE // 2) // _WHITE

    def decode(self, token_ids: Int[Array | np.ndarray, "b n"]) -> UInt8[Array, "b y x 3"]:
        """Pictures in [0, 255] whose three channels are all the grey that a token stands for."""
        # Whole numbers only, so that a compiled division cannot move a grey by one.
        y, x = self.grid
        steps = self.levels - 1
        greys = (_WHITE * jnp.asarray(token_ids, jnp.int32) + steps // 2) // steps
        return repeat(greys.astype(jnp.uint8), "b (y x) -> b y x 3", y=y, x=x)
