"""The Inception network whose features FID and its relatives compare.

It is the InceptionV3 of December 2015 in the form every PyTorch tool uses (`pytorch-fid`,
`torch-fidelity`), not torchvision's: the pools inside the blocks differ. Blocks and branches keep
the published names, so that they can be read beside the weight file.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Shaped

from enat_jax.parallel.placement import Placement

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
    """Activations along the network, channels last: after its two pools, and after blocks."""

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


# Pools of 3x3 windows; padding does not count.
max_pool = partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2))
max_pool_same = partial(nnx.max_pool, window_shape=(3, 3), padding="SAME")
average_pool_same = partial(
    nnx.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False
)


class ConvNorm(nnx.Module):
    """Convolution without bias, batch normalisation by frozen statistics, ReLU.

    Products are float32 on every accelerator (TPUs and GPUs would round the operands), so that
    scores are comparable.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        window: tuple[int, int] = (1, 1),
        *,
        stride: int = 1,
        padding: str = "SAME",
        rngs: nnx.Rngs,
    ):
        self.stride, self.padding = stride, padding
        shape = (*window, features_in, features_out)
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), shape))
        self.scale = nnx.Param(jnp.ones(features_out))
        self.bias = nnx.Param(jnp.zeros(features_out))
        self.mean = nnx.BatchStat(jnp.zeros(features_out))
        self.variance = nnx.BatchStat(jnp.ones(features_out))

    def __call__(self, x: Float[Array, "b y x i"]) -> Float[Array, "b v u o"]:
        """Applies the layer to images with channels last."""
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        scale = self.scale[...] * jax.lax.rsqrt(self.variance[...] + EPSILON)
        offset = self.bias[...] - self.mean[...] * scale
        return jax.nn.relu(y * scale + offset)


class Conv(NamedTuple):
    """A convolution of a block, by the end of its name, of so many channels out and such a window.

    Where its stride is 2, nothing is padded.
    """

    name: str
    features: int
    rows: int = 1
    columns: int = 1
    stride: int = 1


Branches = tuple[tuple[Conv | Callable[[Array], Array], ...], ...]


def block_a(pool_features: int) -> Branches:
    """Mixed_5b, 5c and 5d, on the 35x35 grid: to `224 + pool_features` channels."""
    return (
        (Conv("1x1", 64),),
        (Conv("5x5_1", 48), Conv("5x5_2", 64, 5, 5)),
        (Conv("3x3dbl_1", 64), Conv("3x3dbl_2", 96, 3, 3), Conv("3x3dbl_3", 96, 3, 3)),
        (average_pool_same, Conv("_pool", pool_features)),
    )


def block_b() -> Branches:
    """Mixed_6a, from the 35x35 to the 17x17 grid: 480 channels more."""
    return (
        (Conv("3x3", 384, 3, 3, stride=2),),
        (Conv("3x3dbl_1", 64), Conv("3x3dbl_2", 96, 3, 3), Conv("3x3dbl_3", 96, 3, 3, stride=2)),
        (max_pool,),
    )


def block_c(features: int) -> Branches:
    """Mixed_6b to 6e, on the 17x17 grid, `features` channels inside: to 768 channels."""
    low, high = (features, 1, 7), (features, 7, 1)
    return (
        (Conv("1x1", 192),),
        (Conv("7x7_1", features), Conv("7x7_2", *low), Conv("7x7_3", 192, 7, 1)),
        (
            *(Conv("7x7dbl_1", features), Conv("7x7dbl_2", *high), Conv("7x7dbl_3", *low)),
            *(Conv("7x7dbl_4", *high), Conv("7x7dbl_5", 192, 1, 7)),
        ),
        (average_pool_same, Conv("_pool", 192)),
    )


def block_d() -> Branches:
    """Mixed_7a, from the 17x17 to the 8x8 grid: 512 channels more."""
    seven = (Conv("7x7x3_1", 192), Conv("7x7x3_2", 192, 1, 7), Conv("7x7x3_3", 192, 7, 1))
    return (
        (Conv("3x3_1", 192), Conv("3x3_2", 320, 3, 3, stride=2)),
        (*seven, Conv("7x7x3_4", 192, 3, 3, stride=2)),
        (max_pool,),
    )


def block_e(pool: Callable[[Array], Array]) -> Branches:
    """Mixed_7b and 7c, on the 8x8 grid: to 2048 channels.

    The pool branch takes the mean in Mixed_7b and the largest in Mixed_7c, an oddity of the
    published graph. Two pairs of branches begin with the same layers.
    """
    single, double = (Conv("3x3_1", 384),), (Conv("3x3dbl_1", 448), Conv("3x3dbl_2", 384, 3, 3))
    return (
        (Conv("1x1", 320),),
        (*single, Conv("3x3_2a", 384, 1, 3)),
        (*single, Conv("3x3_2b", 384, 3, 1)),
        (*double, Conv("3x3dbl_3a", 384, 1, 3)),
        (*double, Conv("3x3dbl_3b", 384, 3, 1)),
        (pool, Conv("_pool", 192)),
    )


class Block(nnx.Module):
    """Branches beside each other, whose channels are concatenated in their order."""

    def __init__(self, features_in: int, branches: Branches, *, rngs: nnx.Rngs):
        self.branches = branches
        for branch in branches:
            features = features_in
            for conv in (layer for layer in branch if isinstance(layer, Conv)):
                padding, window = "SAME" if conv.stride == 1 else "VALID", (conv.rows, conv.columns)
                how: dict[str, Any] = {"stride": conv.stride, "padding": padding, "rngs": rngs}
                layer = ConvNorm(features, conv.features, window, **how)
                setattr(self, f"branch{conv.name}", layer)
                features = conv.features

    def __call__(self, x: Float[Array, "b y x i"]) -> Float[Array, "b v u o"]:
        """Applies the block."""
        outputs = [x] * len(self.branches)
        for number, branch in enumerate(self.branches):
            for layer in branch:
                apply = getattr(self, f"branch{layer.name}") if isinstance(layer, Conv) else layer
                outputs[number] = apply(outputs[number])
        return jnp.concatenate(outputs, axis=-1)


class Inception(nnx.Module):
    """FID's InceptionV3, from images to `Features`.

    Weights that are drawn mean nothing until published ones replace them.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv_1a = ConvNorm(3, 32, (3, 3), stride=2, padding="VALID", rngs=rngs)
        self.conv_2a = ConvNorm(32, 32, (3, 3), padding="VALID", rngs=rngs)
        self.conv_2b = ConvNorm(32, 64, (3, 3), rngs=rngs)
        self.conv_3b = ConvNorm(64, 80, rngs=rngs)
        self.conv_4a = ConvNorm(80, 192, (3, 3), padding="VALID", rngs=rngs)
        self.mixed_5b = Block(192, block_a(32), rngs=rngs)
        self.mixed_5c = Block(256, block_a(64), rngs=rngs)
        self.mixed_5d = Block(288, block_a(64), rngs=rngs)
        self.mixed_6a = Block(288, block_b(), rngs=rngs)
        self.mixed_6b = Block(768, block_c(128), rngs=rngs)
        self.mixed_6c = Block(768, block_c(160), rngs=rngs)
        self.mixed_6d = Block(768, block_c(160), rngs=rngs)
        self.mixed_6e = Block(768, block_c(192), rngs=rngs)
        self.mixed_7a = Block(768, block_d(), rngs=rngs)
        self.mixed_7b = Block(1280, block_e(average_pool_same), rngs=rngs)
        self.mixed_7c = Block(2048, block_e(max_pool_same), rngs=rngs)
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
        pool = jnp.mean(stages.mixed_7c, axis=(1, 2))
        spatial = rearrange(stages.mixed_6d[..., :7], "b y x i -> b (y x i)")
        logits = jnp.matmul(pool, self.classifier[...], precision=jax.lax.Precision.HIGHEST)
        return Features(pool, spatial, logits)


class FeatureExtractor:
    """Features of batches of images on a mesh; compiled once for each size and type of images.

    A device looks at `at_once` images at a time.
    """

    def __init__(self, inception: Inception, placement: Placement, *, at_once: int = 16):
        graphdef, state = nnx.split(inception)
        self._state, self._placement = placement.put(state), placement

        def features(state: nnx.State, images: Shaped[Array, "b y x 3"]) -> Features:
            network = nnx.merge(graphdef, state)

            def some(part: Array) -> Features:
                return network(part / jnp.float32(255) if part.dtype == jnp.uint8 else part)

            return placement.map_in_chunks(some, images, at_once)

        self._features = jax.jit(features, out_shardings=placement.batch)

    def __call__(
        self, images: Shaped[Array, "b y x 3"] | Shaped[np.ndarray, "b y x 3"]
    ) -> Features:
        """Features of images, uint8 or floats in [0, 1], split over the mesh by image."""
        return self._features(self._state, self._placement.put(images, self._placement.batch))
