import io

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from enat_jax.data import photos as builder
from enat_jax.data.image_source import ImageConfig, open_images
from enat_jax.data.photos import HELD_OUT_ROW, SPLITS, Photos


@pytest.fixture(scope="module")
def few():
    """Every split with few crops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "SPLITS", {name: (12, by) for name, (_, by) in SPLITS.items()})
        yield


def crops(tmp_path, split):
    examples = Photos(data_dir=tmp_path)._generate_examples(split)
    return {key: (np.asarray(Image.open(io.BytesIO(example["image"]))), example["label"])
            for key, example in examples}  # fmt: skip


def test_no_train_crop_has_a_share_in_what_test_crops_show(few, tmp_path, monkeypatch):
    photograph = np.zeros((427, 640, 3), np.uint8)
    photograph[HELD_OUT_ROW:] = 255
    monkeypatch.setattr(sklearn.datasets, "load_sample_image", lambda name: photograph)
    assert all(crop.max() == 0 for crop, _ in crops(tmp_path, "train").values())
    assert all(crop.min() == 255 for crop, _ in crops(tmp_path, "test").values())


def test_crops_are_the_same_on_every_machine_and_differ_from_each_other(few, tmp_path):
    first, again = crops(tmp_path, "train"), crops(tmp_path, "train")
    assert len(first) == 24
    for key, (crop, label) in first.items():
        np.testing.assert_array_equal(crop, again[key][0])
        assert key.startswith(label)
    assert len({crop.tobytes() for crop, _ in first.values()}) == len(first)


def test_photos_are_prepared_on_first_use(few, tmp_path):
    images = open_images(ImageConfig(name="photos", data_dir=str(tmp_path), split="test"))
    assert len(images) == 24
    assert images.class_names == ("temple", "flower")
    blue, red = [np.mean([images.read(i, 64)[..., channel] for i in range(24)
                          if images.label(i) == 1]) for channel in (2, 0)]  # fmt: skip
    assert red > blue  # the flower is orange
    assert images.read(0, 64).shape == (64, 64, 3)
