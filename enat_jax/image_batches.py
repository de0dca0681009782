"""Batches of images for training, as a Grain pipeline over a source of images."""

import threading
from collections.abc import Callable

import grain
import numpy as np
from jaxtyping import UInt8

from enat_jax.image_source import ImageError, ImageSource, UnreadableImage

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
    reader: Reader,
    num_images: int,
    *,
    batch_size: int,
    seed: int,
    threads: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """An endless stream of shuffled batches, this process's part of it.

    All processes walk one stream of images together, epoch after epoch, each shuffled anew, of
    which process `p` of `q` takes images `p, p + q, p + 2q, ...`. The iterator's state is how many
    it took; it resumes bit for bit, also as an Orbax checkpointable.

    Args:
        reader: reads one image.
        num_images: how many there are.
        batch_size: images per batch in this process.
        seed: decides order, crops and mirroring; in [0, 2**32).
        threads: that read.
        process_index: this process, in [0, process_count).
        process_count: number of processes that share the stream.

    Returns:
        An iterator of uint8 `[batch_size, size, size, 3]`.
    """
    stream = grain.MapDataset.range(num_images).seed(seed).shuffle().repeat()
    images = stream.random_map(reader)[process_index::process_count]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * _PREFETCH)
    batches = images.batch(batch_size, drop_remainder=True)
    return iter(batches.to_iter_dataset(options))
