"""What a VQGAN makes of held-out images: pictures, and how far they are from the originals."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from enat_jax.data.image_source import ImageError, ImageSource, UnreadableImage
from enat_jax.data.pictures import image_grid
from enat_jax.evaluation.features import FeatureExtractor
from enat_jax.evaluation.inception import POOL_FEATURES
from enat_jax.evaluation.inception_weights import load_inception
from enat_jax.evaluation.moments import Moments
from enat_jax.evaluation.scores import frechet_distance_of_moments
from enat_jax.parallel.hosts import all_gather
from enat_jax.parallel.placement import Placement
from enat_jax.tokenizers.levels import as_uint8

_PER_ROW = 8  # originals in a row of the picture
_SMALLEST_ERROR = 1e-10  # a perfect reconstruction has 100 dB
_NO_MOMENTS = Moments.empty(POOL_FEATURES)


class Look(NamedTuple):
    """What was seen.

    Attributes:
        scores: for the log: PSNR, use of the codebook, rFID, and of how many images.
        picture: originals, each above its reconstruction.
    """

    scores: dict[str, float]
    picture: UInt8[np.ndarray, "height width 3"]


def read_images(
    source: ImageSource, count: int, size: int, *, warn: Callable[[str], object]
) -> UInt8[np.ndarray, "b size size 3"]:
    """Centre crops of at most `count` images, spread evenly over a source.

    Unreadable ones are left out, with a line for each.

    Raises:
        ImageError: none is readable.
    """
    images = []
    for index in np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)):
        try:
            images.append(source.read(int(index), size))
        except UnreadableImage as error:
            warn(f"skipped {error}")
    if not images:
        raise ImageError(f"{source.name}: no image is readable")
    return np.stack(images)


class HeldOut:
    """Held-out images, kept in memory, and the compiled pass over them.

    Args:
        graphdef: of the VQGAN.
        codes: in its codebook.
        images: what to look at, the same on every host.
        placement: of the devices that share a batch.
        name: what the log calls them.
        batch_size: images per call, rounded up to what the devices can share.
        pictures: images in the picture.
        inception: FID's published weights; empty leaves rFID out.
    """

    def __init__(
        self,
        graphdef: Any,
        codes: int,
        images: UInt8[np.ndarray, "b y x 3"],
        placement: Placement,
        *,
        name: str,
        batch_size: int,
        pictures: int,
        inception: str = "",
    ):
        self.name = name
        self._codes = codes
        shards = placement.batch_shards
        self._images, self._placement, self._pictures = images, placement, pictures
        self._batch_size = -(-min(batch_size, len(images)) // shards) * shards
        self._features = (
            FeatureExtractor(load_inception(inception), placement) if inception else None
        )
        self._originals: Moments | None = None

        def look(params: nnx.State, images: UInt8[Array, "b y x 3"]) -> tuple[Array, Array, Array]:
            model: Any = nnx.merge(graphdef, params)
            pixels = images / jnp.float32(255)
            token_ids = model.encode(pixels)
            grid = tuple(side // model.cfg.patch for side in images.shape[1:3])
            made = jnp.clip(model.decode(token_ids, grid), 0.0, 1.0)
            error = jnp.mean(jnp.square(made - pixels), axis=(1, 2, 3))
            return as_uint8(made), error, token_ids

        self._look = jax.jit(look, out_shardings=(placement.batch, *2 * [placement.replicated]))

    def __call__(self, params: nnx.State) -> Look:
        """Reconstructs every image; rounded to 8 bits for the picture and for rFID.

        All hosts call it together, and all have the same back.
        """
        errors, token_ids, shown, made_moments = [], [], [], _NO_MOMENTS
        for start in range(0, len(self._images), self._batch_size):
            placed, count = self._batch(start)
            made, error, ids = self._look(params, placed)
            errors.append(np.asarray(error)[:count])
            token_ids.append(np.asarray(ids)[:count])
            if start < self._pictures:
                shown.append(all_gather(made)[:count])
            if self._features:
                made_moments = made_moments.add(self._pool(made)[:count])
        scores = {
            "images": float(len(self._images)),
            "psnr": psnr(np.concatenate(errors)),
            **usage(np.concatenate(token_ids), self._codes),
        }
        if self._features:
            scores["rfid"] = self._distance(made_moments)
        return Look(scores, _picture(self._images, np.concatenate(shown)[: self._pictures]))

    def _batch(self, start: int) -> tuple[Array, int]:
        """Images on the devices, the last one repeated to fill the batch; how many they are."""
        count = min(self._batch_size, len(self._images) - start)
        rows = start + np.minimum(np.arange(self._batch_size), count - 1)
        return self._placement.put(self._images[rows], self._placement.batch), count

    def _pool(self, images: Array) -> np.ndarray:
        assert self._features is not None
        return all_gather(self._features(images).pool)

    def _distance(self, made: Moments) -> float:
        """Frechet distance between the originals' features and the reconstructions'."""
        if self._originals is None:
            self._originals = _NO_MOMENTS
            for start in range(0, len(self._images), self._batch_size):
                placed, count = self._batch(start)
                self._originals = self._originals.add(self._pool(placed)[:count])
        real = self._originals
        return frechet_distance_of_moments(
            real.mean, real.covariance(), made.mean, made.covariance()
        )


def psnr(mean_squared_error: Float[np.ndarray, " b"]) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB, for values in [0, 1]."""
    return float(np.mean(-10 * np.log10(np.maximum(mean_squared_error, _SMALLEST_ERROR))))


def usage(token_ids: Int[np.ndarray, "b n"], size: int) -> dict[str, float]:
    """Share of the codes in use, and the perplexity of their frequencies."""
    counts = np.bincount(token_ids.reshape(-1), minlength=size)
    share = counts[counts > 0] / counts.sum()
    return {
        "codes_used": float(np.mean(counts > 0)),
        "perplexity": float(np.exp(-np.sum(share * np.log(share)))),
    }


def _picture(
    images: UInt8[np.ndarray, "b y x 3"], made: UInt8[np.ndarray, "m y x 3"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Rows of originals, each row above its reconstructions."""
    tiles, labels = [], []
    columns = min(_PER_ROW, len(made))
    for start in range(0, len(made) - columns + 1, columns):
        row = slice(start, start + columns)
        tiles += [images[row], made[row]]
        labels += ["original"] * columns + ["reconstruction"] * columns
    return image_grid(np.concatenate(tiles), labels, columns=columns)
