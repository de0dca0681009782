"""Batches of images for training, as a Grain pipeline over a source of images."""

import threading
from collections.abc import Callable

import grain
import numpy as np
from jaxtyping import UInt8

from enat_jax.data.image_source import ImageError, ImageSource, UnreadableImage
from enat_jax.data.stream import Share, own_part, shuffled

_PREFETCH = 8  # images per thread read ahead of their use


class Reader:
    """Reads images of one size; one that cannot be decoded is replaced by the next that can be.

    What is read depends on the number and the random generator alone, so a run that resumes sees
    the same images. May be used by several threads.

    Args:
        source: the images.
        size: pixels per side.
        random_crops: whether to crop at random; else the image's centre is taken.
        max_unreadable: most images that may be unreadable, as a share of all.
        warn: called with a line for every one, once.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        size: int,
        random_crops: bool,
        max_unreadable: float,
        warn: Callable[[str], object],
    ):
        self._source, self._size, self._random = source, size, random_crops
        self._limit, self._warn = max_unreadable, warn
        self._bad: set[int] = set()
        self._lock = threading.Lock()

    def __call__(self, index: int, rng: np.random.Generator) -> UInt8[np.ndarray, "size size 3"]:
        """One image, mirrored half of the time.

        Args:
            index: its number; taken modulo how many there are.
            rng: decides where it is cropped, and whether it is mirrored.

        Raises:
            ImageError: too many images cannot be decoded.
        """
        while True:
            index %= len(self._source)
            try:
                if self._random:
                    return self._source.read(index, self._size, rng)
                image = self._source.read(index, self._size)
                return np.ascontiguousarray(image[:, ::-1]) if rng.integers(2) else image
            except UnreadableImage as error:
                self._note(index, error)
            index += 1

    def _note(self, index: int, error: UnreadableImage) -> None:
        with self._lock:
            if index in self._bad:
                return
            self._bad.add(index)
            bad, total = len(self._bad), len(self._source)
        if bad > self._limit * total:
            raise ImageError(
                f"{error}: with it {bad} of {total} images are unreadable, more than"
                f" max_unreadable = {self._limit:g} allows"
            )
        self._warn(f"skipped {error}")


def image_batches(
    reader: Reader, num_images: int, share: Share, *, seed: int, threads: int
) -> grain.DatasetIterator:
    """An endless stream of shuffled batches, this host's part of it.

    All hosts walk one stream of images together, epoch after epoch, each shuffled anew; a step
    holds the same images, cropped alike, in the same rows on any number of hosts.

    Args:
        reader: reads one image.
        num_images: how many there are.
        share: which of them, from where on.
        seed: decides order, crops and mirroring; in [0, 2**32).
        threads: that read.

    Returns:
        An iterator of uint8 `[b, size, size, 3]`, of the share's own rows.
    """
    images = own_part(shuffled(num_images, seed).random_map(reader), share)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * _PREFETCH)
    batches = images.batch(len(share.own_rows), drop_remainder=True)
    return iter(batches.to_iter_dataset(options))
