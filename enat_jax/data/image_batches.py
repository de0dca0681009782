"""Batches of images: shuffled without end, for training, or each image once and in order."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int32, UInt8

from enat_jax.config import TokenizerRunConfig
from enat_jax.data.batches import Share, own_part, shuffled
from enat_jax.data.images import ImageSource, UnreadableImage
from enat_jax.errors import UserError

_PREFETCH = 8  # images per thread read ahead of their use
_AHEAD = 2  # batches being read while another is in use


def image_batches(
    source: ImageSource,
    share: Share,
    config: TokenizerRunConfig,
    *,
    warn: Callable[[str], object],
) -> grain.DatasetIterator:
    """An endless stream of shuffled batches, mirrored half of the time; this process's part of it.

    All processes walk one stream of images together, epoch after epoch, each shuffled anew; a step
    holds the same images, cropped alike (at random or in the centre), in the same rows on any
    number of processes. An image that cannot be decoded is replaced by the next that can be: `warn`
    is called with a line for each, once, and more than the share `images.max_unreadable` of all are
    a UserError. `train.seed` decides order, crops and mirroring.

    Returns:
        An iterator of uint8 `[b y x 3]`, `train.image_size` pixels a side, of the share's own rows.
    """
    cfg, max_unreadable = config.train, config.images.max_unreadable
    threads, unreadable = config.images.read_threads, set[int]()

    def read(index: int, rng: np.random.Generator) -> UInt8[np.ndarray, "y x 3"]:
        while True:
            index %= len(source)
            try:
                image = source.read(index, cfg.image_size, rng if cfg.random_crops else None)
                return np.ascontiguousarray(image[:, ::-1]) if rng.integers(2) else image
            except UnreadableImage as error:
                is_new = index not in unreadable
                unreadable.add(index)
                if len(unreadable) > max_unreadable * len(source):
                    raise UserError(
                        f"{error}: {len(unreadable)} of {len(source)} images are unreadable,"
                        f" more than max_unreadable = {max_unreadable:g} allows"
                    ) from error
                if is_new:
                    warn(f"skipped {error}")
            index += 1

    images = own_part(shuffled(len(source), cfg.seed).random_map(read), share)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * _PREFETCH)
    batches = images.batch(len(share.own_rows), drop_remainder=True)
    return iter(batches.to_iter_dataset(options))


class ImageBatch(NamedTuple):
    """Some images of a source: row `i` is for image `span[i]`, and blank unless `readable[i]`.

    `unreadable` are the images that are left out; `labels` are 0 where there are no classes.
    """

    span: range
    images: UInt8[np.ndarray, "b y x 3"]
    labels: Int32[np.ndarray, " b"]
    readable: Bool[np.ndarray, " b"]
    unreadable: list[UnreadableImage]


def read_batches(
    source: ImageSource, spans: Sequence[range], *, batch_size: int, size: int, threads: int
) -> Iterator[ImageBatch]:
    """Centre crops of the images in each span, at most `batch_size`: one batch per span, in order.

    Raises:
        UserError: an image without a class.
    """

    def read(index: int) -> tuple[np.ndarray, int] | UnreadableImage:
        try:
            image = source.read(index, size)
            return image, source.class_id(index) if source.class_names else 0
        except UnreadableImage as error:
            return error

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_AHEAD * batch_size)
    indices = list(itertools.chain.from_iterable(spans))
    stream = iter(grain.MapDataset.source(indices).map(read).to_iter_dataset(options))
    for span in spans:
        batch = ImageBatch(
            span,
            np.zeros((batch_size, size, size, 3), np.uint8),
            np.zeros(batch_size, np.int32),
            np.zeros(batch_size, bool),
            [],
        )
        for row, image in enumerate(itertools.islice(stream, len(span))):
            if isinstance(image, UnreadableImage):
                batch.unreadable.append(image)
            else:
                batch.images[row], batch.labels[row] = image
                batch.readable[row] = True
        yield batch
