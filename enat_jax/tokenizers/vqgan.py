"""VQGAN, the convolutional tokenizer of images: a grid of codebook entries and back."""

import itertools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from enat_jax.tokenizers.config import VQGANConfig

EPSILON = 1e-6  # of every group norm


class Conv(nnx.Module):
    """A convolution of odd size that keeps the resolution, accumulated in float32."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        size: int,
        *,
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        self.kernel = nnx.Param(init(rngs.params(), (size, size, channels_in, channels_out)))
        if bias:
            self.bias = nnx.Param(jnp.zeros(channels_out))

    def __call__(self, x: Float[Array, "b y x i"]) -> Float[Array, "b y x o"]:
        """Convolves, with zeros around the image."""
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...].astype(self.dtype) if hasattr(self, "bias") else y


class GroupNorm(nnx.Module):
    """Normalises groups of channels over the whole image, in float32."""

    def __init__(self, channels: int, groups: int):
        self.groups = min(groups, channels)
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y x c"]:
        """Normalises, then scales and shifts each channel; returns the type it was given."""
        groups = rearrange(x.astype(jnp.float32), "b y x (g c) -> b y x g c", g=self.groups)
        mean = reduce(groups, "b y x g c -> b 1 1 g 1", "mean")
        variance = reduce(jnp.square(groups - mean), "b y x g c -> b 1 1 g 1", "mean")
        normal = (groups - mean) * jax.lax.rsqrt(variance + EPSILON)
        normal = rearrange(normal, "b y x g c -> b y x (g c)")
        return (normal * self.scale[...] + self.bias[...]).astype(x.dtype)


class ResBlock(nnx.Module):
    """Two convolutions beside a shortcut.

    Where the number of channels changes, the shortcut is a 1x1 convolution of the *branch*, not
    of the input: so it is in MaskGIT's network, and in all weights trained with it.
    """

    def __init__(self, cfg: VQGANConfig, channels_in: int, channels_out: int, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        self.norm_in = GroupNorm(channels_in, cfg.norm_groups)
        self.conv_in = Conv(channels_in, channels_out, 3, bias=False, dtype=dtype, rngs=rngs)
        self.norm_out = GroupNorm(channels_out, cfg.norm_groups)
        self.conv_out = Conv(channels_out, channels_out, 3, bias=False, dtype=dtype, rngs=rngs)
        if channels_in != channels_out:
            self.shortcut = Conv(channels_out, channels_out, 1, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b y x i"]) -> Float[Array, "b y x o"]:
        """Applies the block."""
        branch = self.conv_in(jax.nn.silu(self.norm_in(x)))
        branch = self.conv_out(jax.nn.silu(self.norm_out(branch)))
        return branch + (self.shortcut(branch) if hasattr(self, "shortcut") else x)


class Level(nnx.Module):
    """The residual blocks of one resolution, and in the decoder the way up to the next."""

    def __init__(
        self,
        cfg: VQGANConfig,
        channels_in: int,
        channels_out: int,
        *,
        upsample: bool = False,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(cfg.dtype)
        widths = [channels_in] + [channels_out] * cfg.num_res_blocks
        self.blocks = nnx.List(
            ResBlock(cfg, i, o, rngs=rngs) for i, o in itertools.pairwise(widths)
        )
        if upsample:
            self.upsample = Conv(channels_out, channels_out, 3, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b y x i"]) -> Float[Array, "b v u o"]:
        """Applies the blocks, then doubles the resolution where there is a way up."""
        for block in self.blocks:
            x = block(x)
        if hasattr(self, "upsample"):
            x = self.upsample(repeat(x, "b y x c -> b (y j) (x i) c", j=2, i=2))
        return x


class Encoder(nnx.Module):
    """Images to latents: residual blocks and average pooling, no attention."""

    def __init__(self, cfg: VQGANConfig, *, rngs: nnx.Rngs):
        dtype, widths = jnp.dtype(cfg.dtype), cfg.widths
        top = widths[-1]
        self.conv_in = Conv(3, widths[0], 3, bias=False, dtype=dtype, rngs=rngs)
        self.levels = nnx.List(
            Level(cfg, i, o, rngs=rngs)
            for i, o in zip([widths[0], *widths[:-1]], widths, strict=True)
        )
        self.middle = nnx.List(ResBlock(cfg, top, top, rngs=rngs) for _ in range(2))
        self.norm_out = GroupNorm(top, cfg.norm_groups)
        self.conv_out = Conv(top, cfg.latent_channels, 1, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "b y x 3"]) -> Float[Array, "b v u c"]:
        """Latents of images in [0, 1]."""
        x = self.conv_in(images)
        for depth, level in enumerate(self.levels):
            if depth:
                x = reduce(x, "b (y j) (x i) c -> b y x c", "mean", j=2, i=2)
            x = level(x)
        for block in self.middle:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """Latents to images: residual blocks and repetition of pixels followed by a convolution."""

    def __init__(self, cfg: VQGANConfig, *, rngs: nnx.Rngs):
        dtype, widths = jnp.dtype(cfg.dtype), cfg.widths
        top = widths[-1]
        self.conv_in = Conv(cfg.latent_channels, top, 3, bias=True, dtype=dtype, rngs=rngs)
        self.middle = nnx.List(ResBlock(cfg, top, top, rngs=rngs) for _ in range(2))
        self.levels = nnx.List(  # from the lowest resolution up
            Level(cfg, i, o, upsample=depth > 0, rngs=rngs)
            for depth, (i, o) in reversed(
                list(enumerate(zip([*widths[1:], top], widths, strict=True)))
            )
        )
        self.norm_out = GroupNorm(widths[0], cfg.norm_groups)
        self.conv_out = Conv(widths[0], 3, 3, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, latents: Float[Array, "b v u c"]) -> Float[Array, "b y x 3"]:
        """Images, in [0, 1] but for what the network overshoots."""
        x = self.conv_in(latents)
        for block in self.middle:
            x = block(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class VQGAN(nnx.Module):
    """The vq-f16 network of MaskGIT and MAGE (Esser et al. 2021 without attention).

    Images are NHWC in [0, 1], of any resolution that is a multiple of `cfg.patch`; token ids are
    in raster order. A token is the codebook entry nearest to the encoder's output in squared
    distance, the first one where several are equally near.
    """

    def __init__(self, cfg: VQGANConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.encoder = Encoder(cfg, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform", in_axis=1, out_axis=0)
        size = (cfg.codebook_size, cfg.latent_channels)
        self.codebook = nnx.Param(init(rngs.params(), size))

    def nearest(self, latents: Float[Array, "b v u c"]) -> Int32[Array, "b v u"]:
        """The codebook entry nearest to each latent."""
        codebook = self.codebook[...]
        products = jnp.einsum(
            "bvuc,kc->bvuk",
            latents.astype(jnp.float32),
            codebook,
            precision=jax.lax.Precision.HIGHEST,  # a rounded distance is another token
        )
        distances = jnp.sum(jnp.square(codebook), axis=-1) - 2 * products
        return jnp.argmin(distances, axis=-1).astype(jnp.int32)

    def encode(self, images: Float[Array, "b y x 3"]) -> Int32[Array, "b n"]:
        """Token ids of images in [0, 1], in raster order.

        Raises:
            ValueError: a side is no multiple of `cfg.patch`.
        """
        wrong = [side for side in images.shape[1:3] if side % self.cfg.patch]
        if wrong:
            raise ValueError(f"image side {wrong[0]} must be a multiple of {self.cfg.patch}")
        return rearrange(self.nearest(self.encoder(images)), "b v u -> b (v u)")

    def decode(
        self, token_ids: Int[Array, "b n"], grid: tuple[int, int]
    ) -> Float[Array, "b y x 3"]:
        """Images of token ids, in [0, 1] but for what the network overshoots: not clipped."""
        token_ids = rearrange(token_ids, "b (v u) -> b v u", v=grid[0], u=grid[1])
        return self.decoder(self.codebook[...][token_ids]).astype(jnp.float32)


def abstract_vqgan(cfg: VQGANConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The network's structure and the shapes of its parameters, without any memory."""
    return nnx.split(nnx.eval_shape(lambda: VQGAN(cfg, rngs=nnx.Rngs(0))), nnx.Param)


@dataclass(frozen=True)
class VQGANTokenizer:
    """A VQGAN and its weights as a tokenizer; attributes as `Tokenizer`'s."""

    cfg: VQGANConfig
    params: nnx.State = field(repr=False)
    digest: str
    name: str = "vqgan"

    @property
    def codebook_size(self) -> int:
        """Number of codebook entries."""
        return self.cfg.codebook_size

    @property
    def patch(self) -> int:
        """Pixels along each side of a token."""
        return self.cfg.patch

    def encode(self, params: nnx.State, images: Float[Array, "b y x 3"]) -> Int32[Array, "b n"]:
        """Token ids of images in [0, 1]."""
        return self._network(params).encode(images)

    def decode(
        self, params: nnx.State, token_ids: Int[Array, "b n"], grid: tuple[int, int]
    ) -> Float[Array, "b y x 3"]:
        """Images, clipped to [0, 1]."""
        return jnp.clip(self._network(params).decode(token_ids, grid), 0.0, 1.0)

    def _network(self, params: nnx.State) -> VQGAN:
        return nnx.merge(abstract_vqgan(self.cfg)[0], params)
