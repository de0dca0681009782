"""The Inception network whose features FID and its relatives compare.

It is the InceptionV3 of December 2015 in the form every PyTorch tool uses (`pytorch-fid`,
`torch-fidelity`), not torchvision's: the pools inside the blocks differ. Blocks and branches keep
the published names, so that they can be read beside the weight file.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

SIZE = 299  # pixels along each side that the network sees
POOL_FEATURES = 2048
SPATIAL_FEATURES = 17 * 17 * 7
CLASSES = 1008
EPSILON = 1e-3  # of batch normalisation, as TensorFlow trained it


class Features(NamedTuple):
    """What the scores of images are computed from, in float32.

    Attributes:
        pool: `[b 2048]`, not negative; FID, precision and recall.
        spatial: `[b 2023]`, not negative; sFID. The first 7 channels of `Mixed_6d`, its 1x1
            branch, on the 17x17 grid in the order y, x, channel: `mixed_6/conv` of the TensorFlow
            graph, as the ADM evaluation suite takes it.
        logits: `[b 1008]`; Inception Score. Without the bias: so do the ADM evaluation suite and
            torch-fidelity, as the first Inception Score did.
    """

    pool: Float[Array, "b 2048"]
    spatial: Float[Array, "b 2023"]
    logits: Float[Array, "b 1008"]


class Stages(NamedTuple):
    """Activations along the network, channels last.

    Attributes:
        pool_1: `[b 73 73 64]`, after the first pool.
        pool_2: `[b 35 35 192]`, after the second.
        mixed_6d: `[b 17 17 768]`.
        mixed_6e: `[b 17 17 768]`.
        mixed_7c: `[b 8 8 2048]`.
    """

    pool_1: Float[Array, "b 73 73 64"]
    pool_2: Float[Array, "b 35 35 192"]
    mixed_6d: Float[Array, "b 17 17 768"]
    mixed_6e: Float[Array, "b 17 17 768"]
    mixed_7c: Float[Array, "b 8 8 2048"]


def resize(images: Float[Array, "b y x 3"]) -> Float[Array, "b 299 299 3"]:
    """Bilinear, pixel centres aligned and without antialiasing, in float32: FID's own resize.

    It is blind to four pixels of five where images are much larger, and published scores are so.
    """
    shape = (images.shape[0], SIZE, SIZE, 3)
    return jax.image.resize(images.astype(jnp.float32), shape, "linear", antialias=False)


def max_pool(x: Float[Array, "b y x i"]) -> Float[Array, "b v u i"]:
    """The largest of each 3x3 window, every second window."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2))


def max_pool_same(x: Float[Array, "b y x i"]) -> Float[Array, "b y x i"]:
    """The largest of each 3x3 window, around every position."""
    return nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")


def average_pool_same(x: Float[Array, "b y x i"]) -> Float[Array, "b y x i"]:
    """The mean of each 3x3 window, around every position; padding does not count."""
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


class ConvNorm(nnx.Module):
    """Convolution without bias, batch normalisation by frozen statistics, ReLU.

    Operands in `dtype`, normalised in float32. Where `dtype` is float32, products are float32 on
    every accelerator (TPUs and GPUs would round the operands), so that scores are comparable.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        window: tuple[int, int] = (1, 1),
        *,
        stride: int = 1,
        padding: str = "SAME",
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.stride, self.padding, self.dtype = stride, padding, dtype
        shape = (*window, features_in, features_out)
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), shape))
        self.scale = nnx.Param(jnp.ones(features_out))
        self.bias = nnx.Param(jnp.zeros(features_out))
        self.mean = nnx.BatchStat(jnp.zeros(features_out))
        self.variance = nnx.BatchStat(jnp.ones(features_out))

    def __call__(self, x: Float[Array, "b y x i"]) -> Float[Array, "b v u o"]:
        """Applies the layer to images with channels last."""
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        scale = self.scale[...] * jax.lax.rsqrt(self.variance[...] + EPSILON)
        offset = self.bias[...] - self.mean[...] * scale
        return jax.nn.relu(y.astype(jnp.float32) * scale + offset).astype(self.dtype)


class BlockA(nnx.Module):
    """Mixed_5b, 5c and 5d, on the 35x35 grid: `[b y x i]` to `224 + pool_features` channels."""

    def __init__(self, features_in: int, pool_features: int, *, dtype: str, rngs: nnx.Rngs):
        conv = partial(ConvNorm, dtype=dtype, rngs=rngs)
        self.branch1x1 = conv(features_in, 64)
        self.branch5x5_1 = conv(features_in, 48)
        self.branch5x5_2 = conv(48, 64, (5, 5))
        self.branch3x3dbl_1 = conv(features_in, 64)
        self.branch3x3dbl_2 = conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = conv(96, 96, (3, 3))
        self.branch_pool = conv(features_in, pool_features)

    def __call__(self, x: Float[Array, "b y x i"]) -> Float[Array, "b y x o"]:
        """Applies the block."""
        branches = (
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average_pool_same(x)),
        )
        return jnp.concatenate(branches, axis=-1)


class BlockB(nnx.Module):
    """Mixed_6a, from the 35x35 to the 17x17 grid: `480 + i` channels."""

    def __init__(self, features_in: int, *, dtype: str, rngs: nnx.Rngs):
        conv = partial(ConvNorm, dtype=dtype, rngs=rngs)
        self.branch3x3 = conv(features_in, 384, (3, 3), stride=2, padding="VALID")
        self.branch3x3dbl_1 = conv(features_in, 64)
        self.branch3x3dbl_2 = conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = conv(96, 96, (3, 3), stride=2, padding="VALID")

    def __call__(self, x: Float[Array, "b y x i"]) -> Float[Array, "b v u o"]:
        """Applies the block."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate((self.branch3x3(x), double, max_pool(x)), axis=-1)


class BlockC(nnx.Module):
    """Mixed_6b to 6e, on the 17x17 grid, `features` channels inside: 768 channels."""

    def __init__(self, features_in: int, features: int, *, dtype: str, rngs: nnx.Rngs):
        conv = partial(ConvNorm, dtype=dtype, rngs=rngs)
        self.branch1x1 = conv(features_in, 192)
        self.branch7x7_1 = conv(features_in, features)
        self.branch7x7_2 = conv(features, features, (1, 7))
        self.branch7x7_3 = conv(features, 192, (7, 1))
        self.branch7x7dbl_1 = conv(features_in, features)
        self.branch7x7dbl_2 = conv(features, features, (7, 1))
        self.branch7x7dbl_3 = conv(features, features, (1, 7))
        self.branch7x7dbl_4 = conv(features, features, (7, 1))
        self.branch7x7dbl_5 = conv(features, 192, (1, 7))
        self.branch_pool = conv(features_in, 192)

    def __call__(self, x: Float[Array, "b y x i"]) -> Float[Array, "b y x o"]:
        """Applies the block."""
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = (
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(average_pool_same(x)),
        )
        return jnp.concatenate(branches, axis=-1)


class BlockD(nnx.Module):
    """Mixed_7a, from the 17x17 to the 8x8 grid: `512 + i` channels."""

    def __init__(self, features_in: int, *, dtype: str, rngs: nnx.Rngs):
        conv = partial(ConvNorm, dtype=dtype, rngs=rngs)
        self.branch3x3_1 = conv(features_in, 192)
        self.branch3x3_2 = conv(192, 320, (3, 3), stride=2, padding="VALID")
        self.branch7x7x3_1 = conv(features_in, 192)
        self.branch7x7x3_2 = conv(192, 192, (1, 7))
        self.branch7x7x3_3 = conv(192, 192, (7, 1))
        self.branch7x7x3_4 = conv(192, 192, (3, 3), stride=2, padding="VALID")

    def __call__(self, x: Float[Array, "b y x i"]) -> Float[Array, "b v u o"]:
        """Applies the block."""
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        branches = (
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(seven),
            max_pool(x),
        )
        return jnp.concatenate(branches, axis=-1)


class BlockE(nnx.Module):
    """Mixed_7b and 7c, on the 8x8 grid: 2048 channels.

    The pool branch takes the mean in Mixed_7b and the largest in Mixed_7c, an oddity of the
    published graph.
    """

    def __init__(self, features_in: int, *, take_largest: bool, dtype: str, rngs: nnx.Rngs):
        self.take_largest = take_largest
        conv = partial(ConvNorm, dtype=dtype, rngs=rngs)
        self.branch1x1 = conv(features_in, 320)
        self.branch3x3_1 = conv(features_in, 384)
        self.branch3x3_2a = conv(384, 384, (1, 3))
        self.branch3x3_2b = conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = conv(features_in, 448)
        self.branch3x3dbl_2 = conv(448, 384, (3, 3))
        self.branch3x3dbl_3a = conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = conv(384, 384, (3, 1))
        self.branch_pool = conv(features_in, 192)

    def __call__(self, x: Float[Array, "b y x i"]) -> Float[Array, "b y x o"]:
        """Applies the block."""
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = max_pool_same(x) if self.take_largest else average_pool_same(x)
        branches = (
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        )
        return jnp.concatenate(branches, axis=-1)


class Inception(nnx.Module):
    """FID's InceptionV3, from images to `Features`.

    Args:
        dtype: of the convolutions' operands; scores to be compared with others' need float32.
        rngs: draws the weights, which mean nothing until published ones replace them.
    """

    def __init__(self, *, dtype: str = "float32", rngs: nnx.Rngs):
        how = {"dtype": dtype, "rngs": rngs}
        self.conv_1a = ConvNorm(3, 32, (3, 3), stride=2, padding="VALID", **how)
        self.conv_2a = ConvNorm(32, 32, (3, 3), padding="VALID", **how)
        self.conv_2b = ConvNorm(32, 64, (3, 3), **how)
        self.conv_3b = ConvNorm(64, 80, **how)
        self.conv_4a = ConvNorm(80, 192, (3, 3), padding="VALID", **how)
        self.mixed_5b = BlockA(192, 32, **how)
        self.mixed_5c = BlockA(256, 64, **how)
        self.mixed_5d = BlockA(288, 64, **how)
        self.mixed_6a = BlockB(288, **how)
        self.mixed_6b = BlockC(768, 128, **how)
        self.mixed_6c = BlockC(768, 160, **how)
        self.mixed_6d = BlockC(768, 160, **how)
        self.mixed_6e = BlockC(768, 192, **how)
        self.mixed_7a = BlockD(768, **how)
        self.mixed_7b = BlockE(1280, take_largest=False, **how)
        self.mixed_7c = BlockE(2048, take_largest=True, **how)
        shape = (POOL_FEATURES, CLASSES)
        self.classifier = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))

    def stages(self, images: Float[Array, "b 299 299 3"]) -> Stages:
        """Activations for images in [0, 1] of the network's own size."""
        x = self.conv_2b(self.conv_2a(self.conv_1a(2 * images - 1)))
        pool_1 = max_pool(x)
        pool_2 = max_pool(self.conv_4a(self.conv_3b(pool_1)))
        x = self.mixed_6a(self.mixed_5d(self.mixed_5c(self.mixed_5b(pool_2))))
        mixed_6d = self.mixed_6d(self.mixed_6c(self.mixed_6b(x)))
        mixed_6e = self.mixed_6e(mixed_6d)
        mixed_7c = self.mixed_7c(self.mixed_7b(self.mixed_7a(mixed_6e)))
        return Stages(pool_1, pool_2, mixed_6d, mixed_6e, mixed_7c)

    def __call__(self, images: Float[Array, "b y x 3"]) -> Features:
        """Features of images in [0, 1] of any size."""
        stages = self.stages(resize(images))
        pool = jnp.mean(stages.mixed_7c.astype(jnp.float32), axis=(1, 2))
        spatial = rearrange(stages.mixed_6d[..., :7], "b y x i -> b (y x i)").astype(jnp.float32)
        logits = jnp.matmul(pool, self.classifier[...], precision=jax.lax.Precision.HIGHEST)
        return Features(pool, spatial, logits)
