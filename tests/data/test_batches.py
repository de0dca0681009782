import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from enat_jax.data.batches import DataConfig, DataError, RecordInfo, record_info, training_batches
from enat_jax.data.digits import Digits
from enat_jax.data.stream import Share

METADATA = {"tokenizer": "pixels", "codebook_size": 100, "grid": [2, 3], "num_classes": 4}


class Toy(tfds.core.GeneratorBasedBuilder):
    """Records given as arrays; token 0 of a record tells which one it is."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, tokens, labels, metadata, **kwargs):
        self.tokens, self.labels, self.metadata = tokens, labels, metadata
        super().__init__(**kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "tokens": tfds.features.Tensor(shape=(None,), dtype=self.tokens.dtype),
                    "label": tfds.features.Scalar(np.int32),
                    "flipped": tfds.features.Scalar(np.bool_),
                }
            ),
            metadata=tfds.core.MetadataDict(self.metadata),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, (tokens, label) in enumerate(zip(self.tokens, self.labels, strict=True)):
            yield index, {"tokens": tokens, "label": label, "flipped": False}


@pytest.fixture
def write(tmp_path):
    def write(num_records=10, *, tokens=None, labels=None, metadata=METADATA, **fields):
        if tokens is None:
            tokens = np.arange(num_records * 6).reshape(num_records, 6) % 90
            tokens[:, 0] = np.arange(num_records)
        if labels is None:
            labels = np.arange(len(tokens)) % 4
        toy = Toy(
            tokens.astype(np.uint16),
            labels,
            metadata,
            data_dir=tmp_path,
            file_format="array_record",
        )
        toy.download_and_prepare()
        return DataConfig(name="toy", data_dir=str(tmp_path), **fields)

    return write


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    cfg = DataConfig(data_dir=str(tmp_path_factory.mktemp("data")))
    record_info(cfg)
    return cfg


def take(batches, steps):
    return [next(batches) for _ in range(steps)]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a["token_ids"], b["token_ids"])
        np.testing.assert_array_equal(a["class_ids"], b["class_ids"])


def run(code, *, env_path=""):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{env_path}:.", "PATH": "", "JAX_PLATFORMS": "cpu"},
    )


def test_the_digits_are_prepared_on_first_use_in_silence(tmp_path, capfd):
    info = record_info(DataConfig(name="digits", data_dir=str(tmp_path)))
    assert info == RecordInfo(
        tokenizer="pixels",
        tokenizer_digest="",
        codebook_size=17,
        grid=(8, 8),
        num_classes=10,
        class_names=tuple("0123456789"),
        num_records=1797,
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("cache", [True, False])
def test_an_epoch_is_the_data_set(digits, cache):
    cfg = replace(digits, cache=cache)
    batches = take(training_batches(cfg, Share(599), seed=0), 3)
    assert {batch["token_ids"].dtype for batch in batches} == {np.dtype(np.int32)}
    assert {batch["class_ids"].dtype for batch in batches} == {np.dtype(np.int32)}
    found = sorted(
        (int(label), tokens.tolist())
        for batch in batches
        for tokens, label in zip(batch["token_ids"], batch["class_ids"], strict=True)
    )
    source = tfds.builder_from_directory(f"{cfg.data_dir}/digits/1.0.0").as_data_source("train")
    assert found == sorted((record["label"], record["tokens"].tolist()) for record in source)


def test_each_record_is_seen_once_per_epoch_by_exactly_one_host(write):
    cfg, rows = write(10), ([0, 1, 5], [2], [3, 4])
    parts = [take(training_batches(cfg, Share(6, np.array(own)), seed=0), 5) for own in rows]
    # 5 steps of 6 records are 3 epochs of 10
    steps = np.empty((5, 6), int)
    for part, own in zip(parts, rows, strict=True):
        for step, batch in enumerate(part):
            steps[step, own] = batch["token_ids"][:, 0]
    epochs = steps.reshape(3, 10)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(10), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_a_step_holds_the_same_records_in_the_same_rows_on_any_number_of_hosts(write):
    cfg = write(10)
    alone = take(training_batches(cfg, Share(4), seed=0), 6)
    rows = np.array([0, 1]), np.array([2, 3])
    parts = [take(training_batches(cfg, Share(4, own), seed=0), 6) for own in rows]
    for whole, *halves in zip(alone, *parts, strict=True):
        together = np.concatenate([half["token_ids"] for half in halves])
        np.testing.assert_array_equal(together, whole["token_ids"])


def test_the_seed_decides_the_order(write):
    cfg = write(10)
    orders = [
        tuple(next(training_batches(cfg, Share(10), seed=seed))["token_ids"][:, 0].tolist())
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != tuple(range(10))


def test_reading_lazily_gives_the_same_batches(digits):
    cached = training_batches(digits, Share(100), seed=3)
    lazy = training_batches(replace(digits, cache=False), Share(100), seed=3)
    assert_same(take(lazy, 20), take(cached, 20))


@pytest.mark.parametrize("cache", [True, False])
def test_the_stream_goes_on_from_any_record(digits, cache):
    cfg = replace(digits, cache=cache)
    expected = take(training_batches(cfg, Share(500), seed=0), 7)[3:]  # into the second epoch
    assert_same(take(training_batches(cfg, Share(500, first=1500), seed=0), 4), expected)


def test_another_batch_size_goes_on_in_the_middle_of_an_epoch(write):
    cfg = write(10)
    whole = next(training_batches(cfg, Share(20), seed=0))["token_ids"][:, 0]
    first = take(training_batches(cfg, Share(4), seed=0), 2)
    rest = take(training_batches(cfg, Share(3, first=8), seed=0), 4)
    seen = np.concatenate([batch["token_ids"][:, 0] for batch in first + rest])
    np.testing.assert_array_equal(seen, whole)


@pytest.mark.parametrize("cache", [True, False])
def test_a_batch_may_be_larger_than_the_data_set(write, cache):
    batch = next(training_batches(write(3, cache=cache), Share(7), seed=0))
    assert batch["token_ids"].shape == (7, 6)
    assert sorted(np.bincount(batch["token_ids"][:, 0])) == [2, 2, 3]


def test_an_empty_split_is_refused(write):
    cfg = write(10, split="train[:0]")
    with pytest.raises(DataError, match=r"split 'train\[:0\]'.*the split is empty"):
        training_batches(cfg, Share(1), seed=0)


def test_a_part_of_a_split_is_a_split(write):
    assert record_info(write(10, split="train[:30%]")).num_records == 3


def test_an_unknown_split_is_refused(write):
    with pytest.raises(DataError, match=r"split 'test'.*Should be one of \['train'\]"):
        record_info(write(10, split="test"))


def test_records_that_were_never_prepared_are_refused(tmp_path):
    cfg = DataConfig(name="imagenet", data_dir=str(tmp_path), split="validation")
    with pytest.raises(DataError) as error:
        record_info(cfg)
    for part in ("'imagenet'", "'validation'", repr(str(tmp_path)), "no prepared records"):
        assert part in str(error.value)


@pytest.mark.parametrize("cache", [True, False])
class TestRecordsThatContradictTheirMetadata:
    def refused(self, cfg, message):
        with pytest.raises(DataError, match=message):
            take(training_batches(cfg, Share(5), seed=0), 2)

    def test_a_token_id_beyond_the_codebook_is_refused(self, write, cache):
        tokens = np.ones((10, 6), np.uint16)
        tokens[7, 3] = 100
        cfg = write(tokens=tokens, cache=cache)
        self.refused(cfg, r"record \d has tokens = 100, must lie in \[0, 100\)")

    @pytest.mark.parametrize("label", [-1, 4])
    def test_a_label_beyond_the_classes_is_refused(self, write, cache, label):
        cfg = write(labels=np.array([0] * 9 + [label]), cache=cache)
        self.refused(cfg, rf"record \d has label = {label}, must lie in \[0, 4\)")

    def test_records_of_another_length_than_the_grid_are_refused(self, write, cache):
        cfg = write(metadata=METADATA | {"grid": [2, 2]}, cache=cache)
        self.refused(cfg, r"has 6 tokens, the grid 2 x 2 has 4")

    def test_a_damaged_file_is_refused(self, write, cache):
        cfg = write(10, cache=cache)
        (file,) = (tfds.core.Path(cfg.data_dir) / "toy/1.0.0").glob("*array_record*")
        file.write_bytes(file.read_bytes()[:40000])
        self.refused(cfg, "a file is missing or damaged")


def test_all_that_is_wrong_with_the_metadata_is_said_at_once(write):
    with pytest.raises(DataError, match="metadata lack tokenizer; metadata lack grid"):
        record_info(write(metadata={"codebook_size": 5, "num_classes": 4}))


def test_a_codebook_that_uint16_cannot_hold_is_refused(write):
    with pytest.raises(DataError, match=r"codebook_size = 70000, must lie in \[1, 65536\]"):
        record_info(write(metadata=METADATA | {"codebook_size": 70000}))


def test_a_missing_description_is_refused(write):
    cfg = write(10)
    (tfds.core.Path(cfg.data_dir) / "toy/1.0.0/dataset_info.json").unlink()
    with pytest.raises(DataError, match="dataset_info"):
        record_info(cfg)


def test_a_killed_preparation_is_not_believed(tmp_path):
    killed = run(f"""
import os
from enat_jax.data.batches import batches as data
from enat_jax.data.digits import Digits
whole = Digits._generate_examples
def killed(self):
    for index, example in whole(self):
        yield index, example
        if index == 1000:
            os._exit(9)
Digits._generate_examples = killed
data.record_info(data.DataConfig(data_dir={str(tmp_path)!r}))
""")
    assert killed.returncode == 9, killed.stderr
    assert len(list((tmp_path / "digits").iterdir())) == 1  # what it left
    assert record_info(DataConfig(data_dir=str(tmp_path))).num_records == 1797


def test_two_processes_may_prepare_at_the_same_time(tmp_path, monkeypatch):
    whole = Digits._generate_examples

    def overtaken(self):
        monkeypatch.setattr(Digits, "_generate_examples", whole)
        Digits(data_dir=tmp_path, file_format="array_record").download_and_prepare()
        return whole(self)

    monkeypatch.setattr(Digits, "_generate_examples", overtaken)
    assert record_info(DataConfig(data_dir=str(tmp_path))).num_records == 1797


def test_tensorflow_is_never_imported(digits, tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").touch()  # so that an import would succeed, and be seen
    done = run(
        f"""
import sys
from enat_jax.data.batches import DataConfig, training_batches
from enat_jax.data.stream import Share
for folder in {digits.data_dir!r}, {str(tmp_path)!r}:  # prepared, and to be prepared
    for cache in True, False:
        cfg = DataConfig(data_dir=folder, cache=cache)
        next(training_batches(cfg, Share(2), seed=0))
assert "tensorflow" not in sys.modules
""",
        env_path=tmp_path,
    )
    assert done.returncode == 0, done.stderr
