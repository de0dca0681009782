import threading
import time

import numpy as np
import pytest

from enat_jax.data.image_source import ImageError, ImageSource, UnreadableImage
from enat_jax.data.read_ahead import read_batches


class Numbers(ImageSource):
    """Image `i` is `i` in every pixel; some are broken, one has no class."""

    def __init__(self, count, *, broken=(), unlabelled=None):
        self.class_names = ("even", "odd")
        self.count, self.broken, self.unlabelled = count, broken, unlabelled
        self.asked, self.threads = [], set()

    def __len__(self):
        return self.count

    def label(self, index):
        if index == self.unlabelled:
            raise ImageError(f"{index} has no class")
        return index % 2

    def describe(self, index):
        return str(index)

    def encoded(self, index):
        raise NotImplementedError

    def read(self, index, size, rng=None):
        self.asked.append(index)
        self.threads.add(threading.current_thread().name)
        time.sleep(0.001 * (index % 3))  # so that threads overtake each other
        if index in self.broken:
            raise UnreadableImage(str(index), "broken")
        return np.full((size, size, 3), index, np.uint8)


def batches(source, spans, **options):
    options = {"batch_size": 4, "size": 2, "threads": 3} | options
    return read_batches(source, spans, **options)


SPANS = [range(0, 4), range(4, 6), range(6, 10), range(10, 11)]


def test_each_span_is_a_batch_of_one_shape_in_order():
    source = Numbers(11)
    found = list(batches(source, SPANS))
    assert [batch.span for batch in found] == SPANS
    for batch in found:
        assert batch.images.shape == (4, 2, 2, 3)
        numbers = [*batch.span, 0, 0, 0, 0][:4]
        readable = np.arange(4) < len(batch.span)
        np.testing.assert_array_equal(batch.readable, readable)
        expected = np.where(readable, numbers, 0)
        np.testing.assert_array_equal(batch.images[:, 0, 0, 0], expected)
        np.testing.assert_array_equal(batch.labels, expected % 2)
        assert batch.unreadable == []
    assert len(source.threads) == 3


def test_what_is_unreadable_keeps_its_place():
    first, second, *_ = batches(Numbers(11, broken=(1, 5)), SPANS)
    assert first.readable.tolist() == [True, False, True, True]
    assert first.images[:, 0, 0, 0].tolist() == [0, 0, 2, 3]
    assert [str(error) for error in first.unreadable] == ["1: broken"]
    assert second.readable.tolist() == [True, False, False, False]
    assert [error.name for error in second.unreadable] == ["5"]


def test_reading_runs_ahead_but_not_far():
    source = Numbers(400)
    stream = batches(source, [range(i, i + 4) for i in range(0, 400, 4)])
    next(stream)
    time.sleep(0.2)
    assert sorted(source.asked) == list(range(12))  # one in use, two ahead
    next(stream)
    time.sleep(0.2)
    assert sorted(source.asked) == list(range(16))
    stream.close()
    assert len(source.asked) == 16
    assert not [t for t in threading.enumerate() if t.name.startswith("read_batches")]


def test_nothing_is_read_of_no_spans():
    assert list(batches(Numbers(3), [])) == []


def test_an_image_without_a_class_stops():
    with pytest.raises(ImageError, match="2 has no class"):
        list(batches(Numbers(11, unlabelled=2), SPANS))
