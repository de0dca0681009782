"""Images as 256 levels, the way every decoded image is rounded here."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def as_uint8(images: Float[Array, "b y x c"]) -> UInt8[Array, "b y x c"]:
    """Images in [0, 1], clipped, as the nearest of 256 levels."""
    return jnp.floor(jnp.clip(images, 0.0, 1.0) * 255.0 + 0.5).astype(jnp.uint8)
