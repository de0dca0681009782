"""The tokenizer of small images: squares of pixels, each the nearest of a learnt codebook."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, Shaped

from enat_jax.tokenizers.config import PatchesConfig


@dataclass(frozen=True)
class PatchesTokenizer:
    """A codebook of patches `[v (p q c)]` in [0, 1] as a tokenizer; attributes as `Tokenizer`'s."""

    cfg: PatchesConfig
    params: nnx.State = field(repr=False)
    digest: str
    name: str = "patches"

    @property
    def codebook_size(self) -> int:
        """Number of codebook entries."""
        return self.cfg.codebook_size

    @property
    def patch(self) -> int:
        """Pixels along each side of a token."""
        return self.cfg.patch

    def encode(self, params: nnx.State, images: Float[Array, "b y x 3"]) -> Int32[Array, "b n"]:
        """Token ids of images in [0, 1]: the nearest patches, by squared distance in float32."""
        codebook = _codebook(params)
        patches = cut(images.astype(jnp.float32), self.patch)
        likeness = jnp.einsum("b n p, v p -> b n v", patches, codebook, precision="highest")
        squares = jnp.sum(jnp.square(codebook), axis=-1)
        return jnp.argmin(squares - 2 * likeness, axis=-1).astype(jnp.int32)

    def decode(
        self, params: nnx.State, token_ids: Int[Array, "b n"], grid: tuple[int, int]
    ) -> Float[Array, "b y x 3"]:
        """Images in [0, 1] of the patches side by side."""
        patches, (y, x), p = _codebook(params)[token_ids], grid, self.patch
        return rearrange(patches, "b (y x) (p q c) -> b (y p) (x q) c", y=y, x=x, p=p, q=p)


def cut(
    images: Shaped[Array | np.ndarray, "b y x 3"], patch: int
) -> Shaped[Array | np.ndarray, "b n p"]:
    """The square patches of images, row by row from the top left, each flat."""
    return rearrange(images, "b (y p) (x q) c -> b (y x) (p q c)", p=patch, q=patch)


def patches_params(codebook: Float[Array, "v p"] | jax.ShapeDtypeStruct) -> nnx.State:
    """A codebook as a tokenizer's weights."""
    return nnx.State({"codebook": nnx.Param(codebook)})


def abstract_patches(cfg: PatchesConfig) -> nnx.State:
    """The shapes of the weights."""
    shape = (cfg.codebook_size, 3 * cfg.patch**2)
    return patches_params(jax.ShapeDtypeStruct(shape, jnp.float32))


def _codebook(params: nnx.State) -> Float[Array, "v p"]:
    variable: Any = params["codebook"]
    return variable[...]
