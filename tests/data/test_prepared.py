"""Data sets that are prepared on first use, and the two that come along."""

import io

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from enat_jax.data import photos
from enat_jax.data.batches import DataConfig, record_info
from enat_jax.data.digits import Digits
from enat_jax.data.images import ImageConfig, open_images
from enat_jax.data.prepared import open_prepared, shipped
from enat_jax.errors import UserError
from tests.support.records import toys, written


def opened(data_dir, name="digits"):
    return open_prepared(name, str(data_dir), "train", missing="it is not there")


class TestShipped:
    def test_a_data_set_is_the_builder_in_the_file_of_its_name(self):
        assert (shipped("digits"), shipped("photos")) == (Digits, photos.Photos)
        assert [shipped(name) for name in ("tokenize", "nothing", "a/b", "")] == [None] * 4

    def test_one_that_failed_halfway_is_prepared_again(self, monkeypatch, tmp_path):
        generate = Digits._generate_examples

        def failing(self):
            for index, example in generate(self):
                if index == 1000:
                    raise KeyboardInterrupt
                yield index, example

        monkeypatch.setattr(Digits, "_generate_examples", failing)
        with pytest.raises(KeyboardInterrupt):
            opened(tmp_path)
        monkeypatch.undo()
        assert len(opened(tmp_path).source) == 1797

    def test_two_processes_may_prepare_at_the_same_time(self, monkeypatch, tmp_path):
        generate = Digits._generate_examples

        def overtaken(self):
            monkeypatch.setattr(Digits, "_generate_examples", generate)
            Digits(data_dir=tmp_path, file_format="array_record").download_and_prepare()
            return generate(self)

        monkeypatch.setattr(Digits, "_generate_examples", overtaken)
        assert len(opened(tmp_path).source) == 1797


class TestRefusals:
    def test_a_data_set_that_is_not_there_is_named(self, tmp_path):
        where = f"data set 'cifar', split 'train', data_dir '{tmp_path}'"
        with pytest.raises(UserError, match=f"^{where}: it is not there$"):
            opened(tmp_path, "cifar")

    def test_one_without_its_last_file_is_unfinished(self, tmp_path):
        (written(tmp_path).path / "dataset_info.json").unlink()
        with pytest.raises(UserError, match=r"unfinished, without dataset_info.json; .* goes on"):
            record_info(toys(tmp_path))

    def test_the_newest_version_counts(self, tmp_path):
        written(tmp_path)
        (tmp_path / "toys/1.10.0").mkdir()
        with pytest.raises(UserError, match="unfinished"):
            record_info(toys(tmp_path))


def test_the_digits_are_scikit_learns(tmp_path):
    digits = sklearn.datasets.load_digits()
    expected = sorted(
        (int(label), image.astype(int).ravel().tolist())
        for image, label in zip(digits.images, digits.target, strict=True)
    )
    prepared = opened(tmp_path)
    assert sorted((each["label"], each["tokens"].tolist()) for each in prepared.source) == expected
    assert record_info(DataConfig(data_dir=str(tmp_path))).class_names == tuple("0123456789")


class TestPhotos:
    @pytest.fixture(autouse=True)
    def few(self, monkeypatch):
        splits = {name: (12, by) for name, (_, by) in photos.SPLITS.items()}
        monkeypatch.setattr(photos, "SPLITS", splits)

    def crops(self, tmp_path, split):
        examples = photos.Photos(data_dir=tmp_path)._generate_examples(split)
        return {k: np.asarray(Image.open(io.BytesIO(each["image"]))) for k, each in examples}

    def test_no_train_crop_has_a_share_in_what_test_crops_show(self, tmp_path, monkeypatch):
        photograph = np.zeros((427, 640, 3), np.uint8)
        photograph[photos.HELD_OUT_ROW :] = 255
        monkeypatch.setattr(sklearn.datasets, "load_sample_image", lambda name: photograph)
        assert all(crop.max() == 0 for crop in self.crops(tmp_path, "train").values())
        assert all(crop.min() == 255 for crop in self.crops(tmp_path, "test").values())

    def test_crops_are_the_same_on_every_machine_and_differ_from_each_other(self, tmp_path):
        first, again = (self.crops(tmp_path, "train") for _ in range(2))
        assert len({crop.tobytes() for crop in first.values()}) == 24
        np.testing.assert_equal(first, again)

    def test_they_are_images_of_two_classes(self, tmp_path):
        images = open_images(ImageConfig(name="photos", data_dir=str(tmp_path), split="test"))
        assert (len(images), images.class_names) == (24, ("temple", "flower"))
        flowers = [images.read(i, 64) for i in range(24) if images.class_id(i) == 1]
        red, _, blue = np.mean(flowers, axis=(0, 1, 2))
        assert red > blue  # it is orange
