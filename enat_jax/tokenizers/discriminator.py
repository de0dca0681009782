"""The discriminator of a VQGAN's training: images or reconstructions, patch by patch."""

import jax
import jax.numpy as jnp
from einops import reduce
from flax import nnx
from jaxtyping import Array, Float

from enat_jax.tokenizers.config import DiscriminatorConfig
from enat_jax.tokenizers.vqgan import Conv

_SLOPE = 0.2  # of the leaky rectifier


class Discriminator(nnx.Module):
    """Convolutions and average pooling to one verdict per patch (PatchGAN, Isola et al. 2017).

    It has no normalisation, so a verdict depends on nothing but its own patch. Float32 throughout.
    """

    def __init__(self, cfg: DiscriminatorConfig, *, rngs: nnx.Rngs):
        widths = cfg.widths
        dtype = jnp.dtype("float32")
        self.convs = nnx.List(
            Conv(i, o, 3, bias=True, dtype=dtype, rngs=rngs)
            for i, o in zip([3, *widths[:-1]], widths, strict=True)
        )
        self.conv_out = Conv(widths[-1], 1, 3, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "b y x 3"]) -> Float[Array, "b v u"]:
        """Verdicts on images in [0, 1]: positive where a patch looks like a photograph's."""
        x = 2 * images - 1
        for level, conv in enumerate(self.convs):
            if level:
                x = reduce(x, "b (y j) (x i) c -> b y x c", "mean", j=2, i=2)
            x = jax.nn.leaky_relu(conv(x), _SLOPE)
        return self.conv_out(x)[..., 0]


def hinge_loss(
    real: Float[Array, "b v u"], reconstructed: Float[Array, "b v u"]
) -> Float[Array, ""]:
    """What a discriminator minimises, from its verdicts (Lim & Ye 2017, equation 5)."""
    return 0.5 * jnp.mean(jax.nn.relu(1 - real)) + 0.5 * jnp.mean(jax.nn.relu(1 + reconstructed))
