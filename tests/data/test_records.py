import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from enat_jax.data.batches import DataConfig, DataError, record_info, training_batches
from enat_jax.data.record_plan import RecordPlan, RecordsError
from enat_jax.data.records import RecordFolder
from enat_jax.data.stream import Share

PLAN = RecordPlan(
    name="toys",
    tokenizer="patches",
    tokenizer_digest="abcd",
    codebook_size=1000,
    grid=(2, 3),
    image_size=8,
    flips=True,
    source="folder toys",
    source_digest="1234",
    num_images=10,
    class_names=("cat", "dog"),
    shard_size=4,
)


def rows(plan, shard):
    """A shard's records: the image's number in each token, plus 500 in mirror images."""
    images = np.repeat(plan.images_of(shard), 2)
    flipped = np.tile([False, True], len(images) // 2)
    tokens = np.tile((images + 500 * flipped)[:, None], (1, 6)).astype(np.uint16)
    return tokens, (images % 2).astype(np.int32), flipped


def write(folder, shards, skipped=()):
    for shard in shards:
        folder.write(shard, *rows(folder.plan, shard), dict(skipped))


def finished(data_dir, plan=PLAN):
    folder = RecordFolder(plan, data_dir)
    write(folder, range(plan.num_shards))
    folder.finish()
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.path.iterdir()}


def test_every_image_is_in_one_shard():
    assert PLAN.num_shards == 3
    assert [i for shard in range(3) for i in PLAN.images_of(shard)] == list(range(10))
    assert replace(PLAN, num_images=8).num_shards == 2


def test_they_are_a_data_set_of_tfds(tmp_path):
    folder = finished(tmp_path)
    source = tfds.builder_from_directory(folder.path).as_data_source("train")
    records = list(source)
    assert len(records) == 20
    for index, record in enumerate(records):
        image, flipped = divmod(index, 2)
        assert record["tokens"].dtype == np.uint16
        assert record["tokens"].tolist() == [image + 500 * flipped] * 6
        assert (record["label"], record["flipped"]) == (image % 2, flipped == 1)


def test_training_reads_them_and_what_they_were_made_with(tmp_path):
    finished(tmp_path)
    cfg = DataConfig(name="toys", data_dir=str(tmp_path))
    info = record_info(cfg)
    assert (info.tokenizer, info.tokenizer_digest, info.codebook_size) == ("patches", "abcd", 1000)
    assert (info.grid, info.num_records) == ((2, 3), 20)
    assert (info.num_classes, info.class_names) == (2, ("cat", "dog"))
    batch = next(training_batches(cfg, Share(20), seed=0))
    images = [*range(10), *range(500, 510)]
    assert sorted(batch["token_ids"][:, 0]) == images
    assert (batch["token_ids"][:, 0] % 2 == batch["class_ids"]).all()


def test_a_part_of_the_split_may_be_read(tmp_path):
    finished(tmp_path)
    part = DataConfig(name="toys", data_dir=str(tmp_path), split="train[10:14]")
    batch = next(training_batches(part, Share(4), seed=0))
    assert sorted(batch["token_ids"][:, 0]) == [5, 6, 505, 506]


def test_the_metadata_say_what_made_them(tmp_path):
    folder = RecordFolder(PLAN, tmp_path)
    write(folder, [0, 1])
    folder.write(2, *(column[:2] for column in rows(PLAN, 2)), {"9.png": "empty"})
    assert folder.num_skipped() == 1
    assert folder.finish() == 18
    metadata = tfds.builder_from_directory(folder.path).info.metadata
    assert dict(metadata) == {
        "tokenizer": "patches", "tokenizer_digest": "abcd", "codebook_size": 1000, "grid": [2, 3],
        "num_classes": 2, "image_size": 8, "flips": True, "source": "folder toys",
        "source_digest": "1234", "num_images": 10, "num_skipped": 1,
    }  # fmt: skip
    described = json.loads((folder.path / "shard-00002.json").read_text())
    assert described["records"] == 2
    assert described["skipped"] == {"9.png": "empty"}


def test_a_shard_may_hold_no_records(tmp_path):
    folder = RecordFolder(PLAN, tmp_path)
    write(folder, [0, 2])
    folder.write(1, *(column[:0] for column in rows(PLAN, 1)), dict.fromkeys("abcd", "empty"))
    assert folder.finish() == 12
    cfg = DataConfig(name="toys", data_dir=str(tmp_path))
    batch = next(training_batches(cfg, Share(12), seed=0))
    assert set(batch["token_ids"][:, 0] % 500) == {0, 1, 2, 3, 8, 9}


def test_the_bytes_do_not_depend_on_the_order_of_writing(tmp_path):
    straight = finished(tmp_path / "a")
    folder = RecordFolder(PLAN, tmp_path / "b")
    write(folder, [2, 0])
    folder = RecordFolder(PLAN, tmp_path / "b")
    assert folder.missing() == [1]
    write(folder, [1, 0])
    folder.finish()
    assert contents(folder) == contents(straight)


def test_a_shard_without_its_description_does_not_count(tmp_path):
    folder = RecordFolder(PLAN, tmp_path)
    write(folder, [0, 1])
    (folder.path / "shard-00001.json").unlink()
    assert RecordFolder(PLAN, tmp_path).missing() == [1, 2]


def test_a_shard_of_another_length_than_described_does_not_count(tmp_path):
    folder = RecordFolder(PLAN, tmp_path)
    write(folder, [0, 1])
    (file,) = folder.path.glob("*array_record-00000*")
    file.write_bytes(file.read_bytes()[:-1])
    assert folder.missing() == [0, 2]


def test_unfinished_records_are_refused_with_how_far_they_are(tmp_path):
    folder = RecordFolder(PLAN, tmp_path)
    write(folder, [0, 1])
    cfg = DataConfig(name="toys", data_dir=str(tmp_path))
    message = "2 of 3 shards are there; the same tokenize command goes on"
    with pytest.raises(DataError, match=message):
        record_info(cfg)
    with pytest.raises(RecordsError, match="shards 2 are missing"):
        folder.finish()
    write(folder, [2])
    with pytest.raises(DataError, match="3 of 3 shards are there"):
        record_info(cfg)
    assert not folder.finished
    folder.finish()
    assert folder.finished
    assert record_info(cfg).num_records == 20


def test_what_killed_runs_left_is_cleared_away_at_the_end(tmp_path):
    folder = RecordFolder(PLAN, tmp_path)
    (folder.path / ".partial-host-1").write_text("half")
    (folder.path / ".partial-xyz").mkdir()
    (folder.path / ".partial-xyz/features.json").write_text("half")
    write(folder, range(3))
    folder.finish()
    assert [name for name in contents(folder) if name.startswith(".")] == []


CHANGES = {
    "tokenizer": "pixels", "tokenizer_digest": "ffff", "codebook_size": 999, "grid": (3, 2),
    "image_size": 16, "flips": False, "source": "folder dolls", "source_digest": "9876",
    "num_images": 11, "class_names": ("cat", "cow"), "shard_size": 5,
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_records_of_another_plan_are_not_mixed(tmp_path, field):
    RecordFolder(PLAN, tmp_path)
    with pytest.raises(RecordsError) as error:
        RecordFolder(replace(PLAN, **{field: CHANGES[field]}), tmp_path)
    there, here = json.dumps(getattr(PLAN, field)), json.dumps(CHANGES[field])
    said = f"were begun with something else ({field} = {here}, there {there}): choose another name"
    assert said in str(error.value)


def test_every_field_of_a_plan_is_compared():
    assert set(CHANGES) | {"name"} == {field.name for field in dataclasses.fields(RecordPlan)}


def test_another_data_set_is_not_written_into(tmp_path):
    (tmp_path / "toys/1.0.0").mkdir(parents=True)
    (tmp_path / "toys/1.0.0/dataset_info.json").write_text("{}")
    with pytest.raises(RecordsError, match=r"holds something else \(dataset_info.json\)"):
        RecordFolder(PLAN, tmp_path)


def test_all_that_is_wrong_with_a_plan_is_said_at_once(tmp_path):
    plan = replace(PLAN, name="My-Toys", codebook_size=70000, shard_size=0, class_names=("a ",))
    with pytest.raises(RecordsError) as error:
        RecordFolder(plan, tmp_path)
    for part in ("name = 'My-Toys'", "codebook_size = 70000, must lie in [1, 65536]",
                 "shard_size = 0, must be at least 1", "end with a space: a "):  # fmt: skip
        assert part in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_records_of_no_image_are_refused(tmp_path):
    plan = replace(PLAN, num_images=1)
    folder = RecordFolder(plan, tmp_path)
    folder.write(0, *(column[:0] for column in rows(plan, 0)), {"a": "empty"})
    with pytest.raises(RecordsError, match="none of 1 images is readable"):
        folder.finish()


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "toys").write_text("a file")
    with pytest.raises(RecordsError, match="cannot write records to"):
        RecordFolder(PLAN, tmp_path)


def test_a_shard_that_cannot_be_written_is_named(tmp_path):
    folder = RecordFolder(PLAN, tmp_path)
    (folder.path / "toys-train.array_record-00000-of-00003").mkdir()  # as a full disk would
    with pytest.raises(RecordsError, match=r"cannot write .*00000-of-00003"):
        write(folder, [0])
    assert folder.missing() == [0, 1, 2]
