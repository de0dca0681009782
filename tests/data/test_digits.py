import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from enat_jax.data.digits import Digits
from enat_jax.tokenizers.pixels import Pixels


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    builder = Digits(data_dir=tmp_path_factory.mktemp("data"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


def test_the_records_are_scikit_learns_digits(prepared):
    source = tfds.builder_from_directory(prepared).as_data_source("train")
    digits = load_digits()
    expected = sorted(
        (int(label), image.astype(int).ravel().tolist())
        for image, label in zip(digits.images, digits.target, strict=True)
    )
    assert len(source) == 1797
    found = sorted((record["label"], record["tokens"].tolist()) for record in source)
    assert found == expected


def test_a_record_decodes_to_its_picture(prepared):
    record = tfds.builder_from_directory(prepared).as_data_source("train")[0]
    image = Pixels().decode(record["tokens"][None].astype(np.int32))[0, :, :, 0]
    greys = load_digits().images * 255 / 16
    assert np.abs(greys - np.asarray(image)).max(axis=(1, 2)).min() <= 0.5


def test_the_metadata_say_what_the_tokens_were_made_with(prepared):
    info = tfds.builder_from_directory(prepared).info
    assert info.metadata == {
        "tokenizer": "pixels",
        "codebook_size": 17,
        "grid": [8, 8],
        "num_classes": 10,
    }
    assert info.features["tokens"].np_dtype == np.uint16
    assert info.features["tokens"].shape == (64,)
    assert info.features["label"].names == list("0123456789")


def test_the_files_are_readable_without_tensorflow(prepared):
    assert json.loads((prepared / "dataset_info.json").read_text())["fileFormat"] == "array_record"
