import dataclasses
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from enat_jax.data.batches import DataConfig, RecordInfo, Share, record_info, training_batches
from enat_jax.errors import UserError
from tests.support.records import CAPTIONED, toys, written


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


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Ten records of images with 1, 2, 3, 1, ... captions."""
    folder = tmp_path_factory.mktemp("captioned")
    written(folder, **dataclasses.asdict(replace(CAPTIONED, flips=False)))
    return folder


def captions(cfg, steps, share, seed=0):
    """Pairs of image and the number of its caption, step after step."""
    batches, pairs = training_batches(cfg, share, seed=seed), []
    for _ in range(steps):
        batch = next(batches)
        ids = batch["caption_ids"]
        assert batch.keys() == {"token_ids", "caption_ids"}
        assert (ids.dtype, ids.shape[1:]) == (np.int32, (4,))
        assert (ids == ids[:, :1]).all()
        assert (ids[:, 0] // 10 == batch["token_ids"][:, 0]).all(), "captions of their own images"
        pairs.append([divmod(int(row), 10) for row in ids[:, 0]])
    return pairs


class TestCaptions:
    @pytest.mark.parametrize("cache", [True, False])
    def test_one_of_each_images_is_drawn_in_each_epoch(self, captioned, cache):
        drawn = captions(toys(captioned, cache=cache), 60, Share(10))
        for epoch in drawn:
            assert sorted(image for image, _ in epoch) == list(range(10))
        for image in range(10):
            count = np.bincount([k for epoch in drawn for i, k in epoch if i == image])
            assert len(count) == 1 + image % 3
            assert count.min() > 10, "all captions of an image are drawn equally often"
        first, second = (dict(epoch) for epoch in drawn[:2])
        assert first != second

    def test_the_seed_decides_which_with_and_without_a_cache(self, captioned):
        lazy, cached = (captions(toys(captioned, cache=c), 7, Share(4)) for c in (False, True))
        assert lazy == cached
        assert cached != captions(toys(captioned), 7, Share(4), seed=1)

    def test_processes_and_runs_that_go_on_draw_the_same(self, captioned):
        cfg = toys(captioned)
        expected = captions(cfg, 5, Share(6))
        parts = [captions(cfg, 5, Share(6, np.array(own))) for own in ([0, 1, 5], [2], [3, 4])]
        for step in range(5):
            a, b, c = (part[step] for part in parts)
            assert [a[0], a[1], b[0], c[0], c[1], a[2]] == expected[step]
        assert flat(captions(cfg, 4, Share(3, first=18))) == flat(expected)[18:]

    @pytest.mark.parametrize("cache", [True, False])
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ({"vocabulary": 90}, r"a record has caption_ids = 90, must lie in \[0, 90\)"),
            ({"length": 3}, "a record has no caption, or one of not 3 ids"),
        ],
    )
    def test_those_that_contradict_the_metadata_are_refused(self, tmp_path, cache, text, message):
        folder = written(tmp_path, **dataclasses.asdict(CAPTIONED)).path
        stored = json.loads((folder / "metadata.json").read_text())
        stored["text"] |= text
        (folder / "metadata.json").write_text(json.dumps(stored))
        with pytest.raises(UserError, match=message):
            captions(toys(tmp_path, cache=cache), 2, Share(20))


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
