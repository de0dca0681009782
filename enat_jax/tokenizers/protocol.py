"""What every tokenizer of images offers."""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, PyTree, UInt8


@runtime_checkable
class Tokenizer(Protocol):
    """What turns images into token ids and back; both ways are pure functions of arrays.

    Weights are passed along: held by a function, they would be compiled into a program as
    constants.

    Attributes:
        name: of the tokenizer, as configs and records have it.
        codebook_size: number of token ids.
        digest: of its weights, in hexadecimal digits; empty where there are none.
        patch: pixels per side of a token.
        params: the weights, a pytree.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def codebook_size(self) -> int: ...  # noqa: D102
    @property
    def digest(self) -> str: ...  # noqa: D102
    @property
    def patch(self) -> int: ...  # noqa: D102
    @property
    def params(self) -> PyTree: ...  # noqa: D102

    def encode(self, params: PyTree, images: Float[Array, "b y x 3"]) -> Int32[Array, "b n"]:
        """Token ids of images in [0, 1], row by row from the top left."""
        ...

    def decode(
        self, params: PyTree, token_ids: Int[Array, "b n"], grid: tuple[int, int]
    ) -> Float[Array, "b y x 3"]:
        """Images in [0, 1]."""
        ...


def as_uint8(images: Float[Array, "b y x c"]) -> UInt8[Array, "b y x c"]:
    """Images in [0, 1], clipped, in the nearest of 256 levels: as all decoded images are."""
    return jnp.floor(jnp.clip(images, 0.0, 1.0) * 255.0 + 0.5).astype(jnp.uint8)
