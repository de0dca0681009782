"""Images in batches of one shape, read and decoded by threads ahead of their use."""

import collections
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from enat_jax.data.image_source import ImageSource, UnreadableImage

_AHEAD = 2  # batches being read while another is in use


class ImageBatch(NamedTuple):
    """Consecutive images of a source; rows that hold none are blank.

    Attributes:
        span: which images: row `i` is for image `span[i]`.
        images: their pixels.
        labels: their class ids.
        readable: which rows hold an image, out of `len(span)`.
        unreadable: the images that are left out.
    """

    span: range
    images: UInt8[np.ndarray, "b y x 3"]
    labels: Int32[np.ndarray, " b"]
    readable: Bool[np.ndarray, " b"]
    unreadable: list[UnreadableImage]


def read_batches(
    source: ImageSource, spans: Sequence[range], *, batch_size: int, size: int, threads: int
) -> Generator[ImageBatch, None, None]:
    """Centre crops of the images in each span, one batch per span, in order.

    Args:
        source: The images.
        spans: Which images make up a batch, at most `batch_size` each.
        batch_size: Rows of every batch.
        size: Pixels per side.
        threads: How many threads read.

    Raises:
        UserError: an image without a class.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read_batches")
    waiting: collections.deque[tuple[range, list[Future]]] = collections.deque()
    left = iter(spans)
    try:
        while True:
            for span in left:
                waiting.append((span, [pool.submit(_read, source, i, size) for i in span]))
                if len(waiting) > _AHEAD:
                    break
            if not waiting:
                return
            span, futures = waiting.popleft()
            yield _batch(span, [future.result() for future in futures], batch_size, size)
    finally:
        pool.shutdown(cancel_futures=True)


def _read(
    source: ImageSource, index: int, size: int
) -> tuple[UInt8[np.ndarray, "y x 3"], int] | UnreadableImage:
    try:
        return source.read(index, size), source.label(index)
    except UnreadableImage as error:
        return error


def _batch(span: range, found: Sequence, batch_size: int, size: int) -> ImageBatch:
    images = np.zeros((batch_size, size, size, 3), np.uint8)
    labels = np.zeros(batch_size, np.int32)
    readable = np.zeros(batch_size, bool)
    unreadable = []
    for row, each in enumerate(found):
        if isinstance(each, UnreadableImage):
            unreadable.append(each)
        else:
            images[row], labels[row] = each
            readable[row] = True
    return ImageBatch(span, images, labels, readable, unreadable)
