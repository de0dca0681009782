from dataclasses import replace

import numpy as np
import pytest

from enat_jax.config import ImageConfig, TokenizerRunConfig, TokenizerTrainConfig
from enat_jax.data.batches import Share
from enat_jax.data.image_batches import image_batches, read_batches
from enat_jax.errors import UserError
from tests.support.images import numbered, png


def batches_of(source, *, batch_size=3, log=None, random_crops=False, limit=0.5, **share):
    warn = (log if log is not None else []).append
    config = TokenizerRunConfig(
        train=TokenizerTrainConfig(seed=5, image_size=4, random_crops=random_crops),
        images=ImageConfig(max_unreadable=limit, read_threads=2),
    )
    return image_batches(source, Share(batch_size, **share), config, warn=warn)


def take(batches, count):
    return np.concatenate([next(batches) for _ in range(count)])


def numbers(images):
    return images.min(axis=(1, 2, 3)).tolist()


@pytest.fixture(scope="module")
def noises():
    """Images whose crops all differ."""
    data = [png(seed) for seed in range(10)]
    return replace(numbered(10), encoded=data.__getitem__)


class TestTraining:
    def test_an_epoch_holds_every_image_once_and_the_next_in_another_order(self):
        batches = batches_of(numbered(12))
        first, second = numbers(take(batches, 4)), numbers(take(batches, 4))
        assert sorted(first) == sorted(second) == list(range(12))
        assert first != second

    @pytest.mark.parametrize("random_crops", [False, True])
    def test_images_are_mirrored_half_of_the_time(self, random_crops):
        images = take(batches_of(numbered(30), random_crops=random_crops), 40)
        left, right = images[:, 0, 0, 0], images[:, 0, -1, 0]
        mirrored = left > right
        assert (np.where(mirrored, left, right) > 190).all()
        assert 0.3 < mirrored.mean() < 0.7

    @pytest.mark.parametrize(("random_crops", "ways"), [(True, 48), (False, 20)])
    def test_crops_are_random_if_asked(self, noises, random_crops, ways):
        images = take(batches_of(noises, random_crops=random_crops), 20)
        distinct = len({image.tobytes() for image in images})
        assert distinct >= ways if random_crops else distinct <= ways  # mirrored or not

    def test_the_stream_goes_on_where_it_stopped(self, noises):
        expected = take(batches_of(noises, random_crops=True), 8)[9:]
        again = batches_of(noises, random_crops=True, first=9)
        np.testing.assert_array_equal(take(again, 5), expected)

    def test_processes_hold_the_rows_of_one_batch_cropped_alike(self, noises):
        every, *parts = (
            take(batches_of(noises, batch_size=4, random_crops=True, rows=rows), 4)
            for rows in (None, np.array([0, 1]), np.array([2, 3]))
        )
        steps = [part.reshape(4, 2, 4, 4, 3) for part in parts]
        np.testing.assert_array_equal(np.concatenate(steps, axis=1).reshape(every.shape), every)

    def test_an_unreadable_image_is_named_once_and_the_next_one_taken(self):
        logged = []
        batches = batches_of(numbered(6, broken=(2, 5)), log=logged)
        assert sorted(numbers(take(batches, 2))) == [0, 0, 1, 3, 3, 4]
        take(batches, 2)
        assert sorted(line.split(":")[0] for line in logged) == ["skipped 2", "skipped 5"]

    def test_more_unreadable_images_than_allowed_stop_the_stream(self):
        batches = batches_of(numbered(6, broken=(2, 3)), limit=0.2)
        with pytest.raises(UserError, match=r"[23]: .*: 2 of 6 images .* = 0\.2 allows"):
            take(batches, 4)


SPANS = [range(0, 4), range(4, 6), range(6, 10), range(10, 11)]


class TestInOrder:
    def read(self, source, spans=SPANS):
        return read_batches(source, spans, batch_size=4, size=2, threads=3)

    def test_each_span_is_a_batch_of_one_shape(self):
        batches = list(self.read(numbered(11)))
        assert [batch.span for batch in batches] == SPANS
        for batch in batches:
            assert batch.images.shape == (4, 2, 2, 3)
            expected = [*batch.span, 0, 0, 0][:4]
            np.testing.assert_array_equal(batch.readable, np.arange(4) < len(batch.span))
            np.testing.assert_array_equal(batch.images[:, 0, 0, 0], expected)
            np.testing.assert_array_equal(batch.labels, np.array(expected) % 2)
        assert list(self.read(numbered(11), [])) == []

    def test_what_is_unreadable_keeps_its_place(self):
        first, second, *_ = self.read(numbered(11, broken=(1, 5)))
        assert first.readable.tolist() == [True, False, True, True]
        assert first.images[:, 0, 0, 0].tolist() == [0, 0, 2, 3]
        assert second.readable.tolist() == [True, False, False, False]
        assert [error.name for error in first.unreadable + second.unreadable] == ["1", "5"]

    def test_threads_read_ahead_but_not_far(self):
        asked = []
        source = replace(numbered(400), encoded=lambda i: asked.append(i) or png(i))
        stream = self.read(source, [range(i, i + 4) for i in range(0, 400, 4)])
        next(stream), next(stream)
        assert set(range(8)) <= set(asked) <= set(range(16))  # two in use, two ahead

    def test_an_image_without_a_class_stops(self):
        def class_id(index):
            raise UserError(f"{index} has no class")

        with pytest.raises(UserError, match="has no class"):
            next(self.read(replace(numbered(11), class_id=class_id)))
