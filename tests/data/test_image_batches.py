import numpy as np
import pytest

from enat_jax.data.image_batches import Reader, image_batches
from enat_jax.data.image_source import ImageError, ImageSource, UnreadableImage
from enat_jax.data.stream import Share


class Numbers(ImageSource):
    """Images that show their number on the left, and how they were cropped on the right."""

    def __init__(self, count, bad=()):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def label(self, index):
        return 0

    def describe(self, index):
        return f"number {index}"

    def encoded(self, index):
        return b""

    def read(self, index, size, rng=None):
        assert index in range(self.count)
        if index in self.bad:
            raise UnreadableImage(self.describe(index), "torn")
        image = np.full((size, size, 3), index, np.uint8)
        image[:, size // 2 :] = 200 if rng is None else rng.integers(201, 250)
        return image


def batches_of(source, *, batch_size=3, said=None, **options):
    random_crops = options.pop("random_crops", False)
    limit = options.pop("max_unreadable", 0.5)
    warn = (said if said is not None else []).append
    reader = Reader(source, size=4, random_crops=random_crops, max_unreadable=limit, warn=warn)
    return image_batches(reader, len(source), Share(batch_size, **options), seed=5, threads=2)


def take(batches, count):
    return np.concatenate([next(batches) for _ in range(count)])


def numbers(images):
    return images.min(axis=(1, 2, 3)).tolist()


def test_an_epoch_holds_every_image_once_and_the_next_in_another_order():
    batches = batches_of(Numbers(12))
    first, second = numbers(take(batches, 4)), numbers(take(batches, 4))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_images_are_mirrored_half_of_the_time():
    images = take(batches_of(Numbers(30)), 40)
    mirrored = images[:, 0, 0, 0] == 200
    assert (images[~mirrored, 0, -1, 0] == 200).all()
    assert 0.3 < mirrored.mean() < 0.7


def test_random_crops_are_drawn_by_the_source():
    images = take(batches_of(Numbers(12), random_crops=True), 4)
    assert len(np.unique(images[:, 0, -1, 0])) > 4
    assert images[:, 0, -1, 0].min() > 200


def test_the_stream_goes_on_where_it_stopped():
    expected = take(batches_of(Numbers(10), random_crops=True), 8)[9:]
    again = batches_of(Numbers(10), random_crops=True, first=9)
    np.testing.assert_array_equal(take(again, 5), expected)


def test_hosts_hold_the_rows_of_one_batch_cropped_alike():
    whole = take(batches_of(Numbers(8), batch_size=4, random_crops=True), 4)
    rows = np.array([0, 1]), np.array([2, 3])
    parts = [take(batches_of(Numbers(8), batch_size=4, random_crops=True, rows=own), 4)
             for own in rows]  # fmt: skip
    np.testing.assert_array_equal(
        whole.reshape(4, 2, 2, 4, 4, 3)[:, 0].reshape(parts[0].shape), parts[0]
    )
    np.testing.assert_array_equal(
        whole.reshape(4, 2, 2, 4, 4, 3)[:, 1].reshape(parts[1].shape), parts[1]
    )


def test_an_unreadable_image_is_named_once_and_the_next_one_taken():
    said = []
    batches = batches_of(Numbers(6, bad=(2, 3)), said=said)
    assert sorted(numbers(take(batches, 2))) == [0, 1, 4, 4, 4, 5]
    take(batches, 2)
    assert sorted(said) == ["skipped number 2: torn", "skipped number 3: torn"]


def test_the_last_image_is_followed_by_the_first():
    assert 5 not in numbers(take(batches_of(Numbers(6, bad=(5,))), 4))


def test_more_unreadable_images_than_allowed_stop_the_stream():
    batches = batches_of(Numbers(6, bad=(2, 3)), max_unreadable=0.2)
    with pytest.raises(ImageError, match=r"number [23]: torn: with it 2 of 6 .* = 0\.2 allows"):
        take(batches, 4)
