"""What a VQGAN makes of held-out images: pictures, and how far they are from the originals."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from enat_jax.data.images import ImageSource, UnreadableImage
from enat_jax.data.pictures import image_grid
from enat_jax.errors import UserError
from enat_jax.evaluation.frechet import Moments, frechet
from enat_jax.evaluation.inception import FeatureExtractor
from enat_jax.evaluation.inception_weights import load_inception
from enat_jax.evaluation.metric import Objective
from enat_jax.parallel.hosts import all_gather
from enat_jax.parallel.placement import Placement
from enat_jax.tokenizers.protocol import as_uint8

_PER_ROW = 8  # originals in a row of the picture
_SMALLEST_ERROR = 1e-10  # a perfect reconstruction has 100 dB


def read_images(
    source: ImageSource, count: int, size: int, *, warn: Callable[[str], object]
) -> UInt8[np.ndarray, "b size size 3"]:
    """Centre crops of at most `count` images, spread evenly over a source.

    Unreadable ones are left out, with a line for each.

    Raises:
        UserError: none is readable.
    """
    images = []
    for index in np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)):
        try:
            images.append(source.read(int(index), size))
        except UnreadableImage as error:
            warn(f"skipped {error}")
    if not images:
        raise UserError(f"{source.name}: no image is readable")
    return np.stack(images)


class Reconstructions:
    """Held-out images, kept in memory on every process, and the compiled pass over them.

    The graphdef is of a VQGAN with so many `codes`; the log calls the images by their `name`; the
    first `pictures` of them are shown. `batch_size` is rounded up to what the devices can share.
    `inception` names FID's published weights; empty leaves rFID out.
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
        self._codes, self._images, self._pictures = codes, images, pictures
        self._placement = placement
        shards = placement.batch_shards
        self._batch_size = -(-min(batch_size, len(images)) // shards) * shards
        self._rfid = self._make_rfid(inception) if inception else None

        def reconstruct(params: nnx.State, images: UInt8[Array, "b y x 3"]) -> tuple[Array, ...]:
            model: Any = nnx.merge(graphdef, params)
            pixels = images / jnp.float32(255)
            token_ids = model.encode(pixels)
            grid = tuple(side // model.cfg.patch for side in images.shape[1:3])
            made = jnp.clip(model.decode(token_ids, grid), 0.0, 1.0)
            error = jnp.mean(jnp.square(made - pixels), axis=(1, 2, 3))
            return as_uint8(made), error, token_ids

        by_image, replicated = placement.batch, placement.replicated
        self._reconstruct = jax.jit(reconstruct, out_shardings=(by_image, replicated, replicated))

    def __call__(
        self, params: nnx.State
    ) -> tuple[dict[str, float], UInt8[np.ndarray, "height width 3"]]:
        """Reconstructs every image; rounded to 8 bits for the picture and for rFID.

        All processes call it together, and all have the same back.

        Returns:
            PSNR, use of the codebook, rFID, and of how many images; and a picture of originals,
            each above its reconstruction.
        """
        errors, token_ids, shown = [], [], []
        rfid = self._rfid.start() if self._rfid else None
        for start, count, placed in self._batches():
            made, error, ids = self._reconstruct(params, placed)
            errors.append(np.asarray(error)[:count])
            token_ids.append(np.asarray(ids)[:count])
            if start < self._pictures:
                shown.append(all_gather(made)[:count])
            if rfid:
                rfid.add(made, np.zeros(count, np.int32))
        scores = {
            "images": float(len(self._images)),
            "psnr": psnr(np.concatenate(errors)),
            **usage(np.concatenate(token_ids), self._codes),
            **(rfid.value() if rfid else {}),
        }
        return scores, _picture(self._images, np.concatenate(shown)[: self._pictures])

    def _batches(self) -> Iterator[tuple[int, int, Array]]:
        """The first image's number, how many count, and them, the last repeated to fill a batch."""
        for start in range(0, len(self._images), self._batch_size):
            count = min(self._batch_size, len(self._images) - start)
            rows = start + np.minimum(np.arange(self._batch_size), count - 1)
            yield start, count, self._placement.put(self._images[rows], self._placement.batch)

    def _make_rfid(self, inception: str) -> Objective:
        """The Frechet distance between the originals' features and the reconstructions'."""
        extract = FeatureExtractor(load_inception(inception), self._placement)
        batches = self._batches()
        pool = [all_gather(extract(placed).pool)[:count] for _, count, placed in batches]
        real = Moments.empty(pool[0].shape[1]).add(np.concatenate(pool)).gaussian()
        return Objective("uint8", (frechet("rfid", real),), lambda made: extract(made).pool)


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
    columns = min(_PER_ROW, len(made))
    rows = len(made) // columns
    pairs = np.stack([images[: rows * columns], made[: rows * columns]])
    tiles = rearrange(pairs, "p (r n) y x c -> (r p n) y x c", n=columns)
    labels = (["original"] * columns + ["reconstruction"] * columns) * rows
    return image_grid(tiles, labels, columns=columns)
