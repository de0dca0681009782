import json
import subprocess
import sys

import numpy as np
import pytest

from enat_jax.data.batches import DataConfig, RecordInfo, Share, record_info, training_batches
from enat_jax.errors import UserError
from tests.support.records import toys, written


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Ten records, numbered by their tokens."""
    return written(tmp_path_factory.mktemp("data"), flips=False).path.parents[1]


def take(cfg, steps, share, seed=0):
    batches = training_batches(cfg, share, seed=seed)
    return [next(batches)["token_ids"][:, 0].tolist() for _ in range(steps)]


def flat(steps):
    return [number for step in steps for number in step]


@pytest.mark.parametrize("cache", [True, False])
def test_an_epoch_is_the_data_set_and_the_next_is_in_another_order(data_dir, cache):
    cfg = toys(data_dir, cache=cache)
    first, second = (flat(take(cfg, steps, Share(5)))[-10:] for steps in (2, 4))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    batch = next(training_batches(cfg, Share(10), seed=0))
    assert {name: (column.dtype, column.shape) for name, column in batch.items()} == {
        "token_ids": (np.int32, (10, 6)), "class_ids": (np.int32, (10,))
    }  # fmt: skip
    np.testing.assert_array_equal(batch["class_ids"], batch["token_ids"][:, 0] % 2)


def test_reading_lazily_gives_the_same_batches(data_dir):
    lazy, cached = (take(toys(data_dir, cache=c), 7, Share(4)) for c in (False, True))
    assert lazy == cached


def test_each_record_is_seen_once_per_epoch_by_exactly_one_process(data_dir):
    rows = [0, 1, 5], [2], [3, 4]
    steps = np.empty((5, 6), int)  # 5 steps of 6 records are 3 epochs of 10
    for own in rows:
        steps[:, own] = take(toys(data_dir), 5, Share(6, np.array(own)))
    np.testing.assert_array_equal(np.sort(steps.reshape(3, 10), axis=1), [list(range(10))] * 3)
    assert steps.tolist() == take(toys(data_dir), 5, Share(6)), "the rows of one process alone"


def test_the_seed_decides_the_order(data_dir):
    orders = [flat(take(toys(data_dir), 1, Share(10), seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != list(range(10))


def test_the_stream_goes_on_from_any_record_in_batches_of_any_size(data_dir):
    cfg = toys(data_dir)
    expected = flat(take(cfg, 1, Share(23)))
    assert flat(take(cfg, 2, Share(4)) + take(cfg, 5, Share(3, first=8))) == expected


@pytest.mark.parametrize("cache", [True, False])
def test_a_batch_may_be_larger_than_the_data_set(data_dir, cache):
    cfg = toys(data_dir, cache=cache, split="train[:3]")
    assert sorted(np.bincount(flat(take(cfg, 1, Share(7))))) == [2, 2, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "train[:0]"}, r"split 'train\[:0\]'.*the split is empty"),
        ({"split": "test"}, r"split 'test'.*Should be one of \['train'\]"),
        (
            {"name": "imagenet"},
            "data set 'imagenet', split 'train', .*no prepared records",
        ),
        ({"name": "photos"}, "not token records: metadata lack tokenizer; .* features lack tokens"),
    ],
)
def test_what_is_not_there_is_refused(data_dir, fields, message, monkeypatch):
    monkeypatch.setattr("enat_jax.data.photos.SPLITS", {"train": (1, (2,))})
    with pytest.raises(UserError, match=message):
        record_info(DataConfig(**{"name": "toys", "data_dir": str(data_dir), **fields}))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"codebook_size": 9}, r"a record has tokens = 9, must lie in \[0, 9\)"),
        ({"num_classes": 1}, r"a record has label = 1, must lie in \[0, 1\)"),
        ({"grid": [2, 2]}, r"records of \[6\] tokens, the grid 2 x 2 has 4"),
        (None, "array_record-00001-of-00003 is missing or damaged"),
    ],
)
def test_records_that_contradict_their_metadata_are_refused(tmp_path, cache, metadata, message):
    folder = written(tmp_path, flips=False).path
    if metadata is None:
        file = next(folder.glob("*array_record-00001*"))
        file.write_bytes(file.read_bytes()[:40000])
    else:
        stored = json.loads((folder / "metadata.json").read_text())
        (folder / "metadata.json").write_text(json.dumps(stored | metadata))
    with pytest.raises(UserError, match=message):
        take(toys(tmp_path, cache=cache), 2, Share(10))


def test_the_digits_are_known_without_tensorflow(tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").touch()  # so that an import would succeed, and be seen
    code = f"""
import sys
from enat_jax.data.batches import DataConfig, Share, record_info, training_batches
for cache in True, False:  # to be prepared, and prepared
    cfg = DataConfig(data_dir={str(tmp_path)!r}, cache=cache)
    next(training_batches(cfg, Share(2), seed=0))
assert "tensorflow" not in sys.modules
"""
    env = {"PYTHONPATH": f"{tmp_path}:.", "PATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=env
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")  # in silence
    assert record_info(DataConfig(data_dir=str(tmp_path))) == RecordInfo(
        tokenizer="pixels",
        tokenizer_digest="",
        codebook_size=17,
        grid=(8, 8),
        num_classes=10,
        class_names=tuple("0123456789"),
        num_records=1797,
    )
