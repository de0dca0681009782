import dataclasses
import hashlib
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from enat_jax.data.batches import Share, record_info, training_batches
from enat_jax.data.records import RecordFolder, RecordPlan
from enat_jax.errors import UserError
from tests.support.records import CAPTIONED, PLAN, TEXT, toys, write_shards, written


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.path.iterdir()}


def columns(count):
    return {"tokens": np.zeros((count, 6), np.uint16), "label": [0] * count,
            "flipped": [False] * count}  # fmt: skip


def first_tokens(cfg, count):
    batch = next(training_batches(cfg, Share(count), seed=0))
    assert (batch["token_ids"][:, 0] % 2 == batch["class_ids"]).all()
    return sorted(batch["token_ids"][:, 0])


def test_every_image_is_in_one_shard():
    assert [list(PLAN.images_of(shard)) for shard in range(3)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]
    ]  # fmt: skip
    assert (PLAN.num_shards, replace(PLAN, num_images=8).num_shards) == (3, 2)


def test_they_are_a_data_set_of_tfds(tmp_path):
    folder = written(tmp_path)
    records = list(tfds.builder_from_directory(folder.path).as_data_source("train"))
    assert len(records) == 20
    for index, record in enumerate(records):
        image, flipped = divmod(index, 2)
        assert record["tokens"].dtype == np.uint16
        assert record["tokens"].tolist() == [image + 500 * flipped] * 6
        assert (record["label"], record["flipped"]) == (image % 2, flipped == 1)


def test_of_captioned_images_they_hold_all_captions_and_their_ids(tmp_path):
    folder = written(tmp_path, **dataclasses.asdict(CAPTIONED))
    builder = tfds.builder_from_directory(folder.path)
    for index, record in enumerate(builder.as_data_source("train")):
        image = index // 2
        captions = range(1 + image % 3)
        assert [each.decode() for each in record["captions"]] == [f"{image}.{k}" for k in captions]
        ids = np.stack(record["caption_ids"])
        assert ids.dtype == np.int32
        assert ids.tolist() == [[10 * image + k] * 4 for k in captions]
        assert "label" not in record
    assert builder.info.metadata["text"] == TEXT
    info = record_info(toys(tmp_path))
    assert (info.text, info.class_names, info.num_classes) == (TEXT, (), 0)
    before = contents(folder)
    folder = RecordFolder(CAPTIONED, tmp_path)
    assert folder.finished
    assert contents(folder) == before


def test_training_reads_them_or_a_part_and_what_they_were_made_with(tmp_path):
    written(tmp_path)
    info = record_info(toys(tmp_path))
    assert dataclasses.astuple(info) == (
        "patches", "abcd", 1000, (2, 3), 2, ("cat", "dog"), 20, None
    )  # fmt: skip
    assert first_tokens(toys(tmp_path), 20) == [*range(10), *range(500, 510)]
    assert first_tokens(toys(tmp_path, split="train[10:14]"), 4) == [5, 6, 505, 506]


def test_the_metadata_say_what_made_them(tmp_path):
    folder = RecordFolder(PLAN, tmp_path)
    write_shards(folder, [0, 2])
    folder.write(1, columns(1), {"5.png": "empty"})
    assert (folder.num_skipped(), folder.finish()) == (1, 13)
    assert dict(tfds.builder_from_directory(folder.path).info.metadata) == {
        "tokenizer": "patches", "tokenizer_digest": "abcd", "codebook_size": 1000, "grid": [2, 3],
        "num_classes": 2, "image_size": 8, "flips": True, "source": "folder toys",
        "source_digest": "1234", "num_images": 10, "num_skipped": 1,
    }  # fmt: skip
    described = json.loads((folder.path / "shard-00001.json").read_text())
    assert (described["records"], described["skipped"]) == (1, {"5.png": "empty"})


def test_a_shard_may_hold_no_records_but_not_all_of_them(tmp_path):
    folder = RecordFolder(PLAN, tmp_path)
    for shard in range(3):
        folder.write(shard, columns(0), {})
    with pytest.raises(UserError, match="none of 10 images is readable"):
        folder.finish()
    write_shards(folder, [0, 2])
    assert folder.finish() == 12
    assert {token % 500 for token in first_tokens(toys(tmp_path), 12)} == {0, 1, 2, 3, 8, 9}


def test_the_bytes_do_not_depend_on_the_order_of_writing_nor_on_what_killed_runs_left(tmp_path):
    folder = RecordFolder(PLAN, tmp_path / "b")
    (folder.path / ".partial-host-1").write_text("half")
    (folder.path / ".partial-xyz").mkdir()
    (folder.path / ".partial-xyz/features.json").write_text("half")
    write_shards(folder, [2, 0])
    folder = RecordFolder(PLAN, tmp_path / "b")
    assert folder.missing() == [1]
    write_shards(folder, [1, 0])
    folder.finish()
    assert contents(folder) == contents(written(tmp_path / "a"))


def test_the_bytes_are_those_of_earlier_versions(tmp_path):
    digest = hashlib.sha256()
    for name, data in sorted(contents(written(tmp_path)).items()):
        data = re.sub(rb' "crc32": \d+,\n', b"", data)  # they had none
        digest.update(name.encode() + data)
    assert digest.hexdigest()[:16] == "ee1a28b74f0235d5", "records that are begun could not go on"


def test_a_shard_counts_with_its_description_and_the_length_that_it_says(tmp_path):
    folder = RecordFolder(PLAN, tmp_path)
    write_shards(folder, [0, 1])
    (folder.path / "shard-00001.json").unlink()
    assert RecordFolder(PLAN, tmp_path).missing() == [1, 2]
    (file,) = folder.path.glob("*array_record-00000*")
    file.write_bytes(file.read_bytes()[:-1])
    assert folder.missing() == [0, 1, 2]


def flip(file):
    data = bytearray(file.read_bytes())
    data[110] ^= 1  # of the first record, behind the headers
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [
    flip, lambda file: file.write_bytes(file.read_bytes()[:-1]), lambda file: file.unlink(),
])  # fmt: skip
def test_a_damaged_shard_is_named_when_training_and_written_again(tmp_path, harm):
    folder = written(tmp_path)
    before, (file,) = contents(folder), folder.path.glob("*array_record-00001*")
    harm(file)
    with pytest.raises(UserError, match=r"damaged|corrupt"):
        training_batches(toys(tmp_path, cache=True), Share(4), seed=0)
    folder = RecordFolder(PLAN, tmp_path)
    assert not folder.finished
    assert folder.missing() == [1]
    write_shards(folder, [1])
    folder.finish()
    assert folder.finished
    assert contents(folder) == before


def test_shards_without_a_crc_are_those_of_earlier_versions(tmp_path):
    folder = written(tmp_path)
    for path in folder.path.glob("shard-*.json"):
        path.write_text(re.sub(r' "crc32": \d+,\n', "", path.read_text()))
    assert RecordFolder(PLAN, tmp_path).finished
    assert record_info(toys(tmp_path)).num_records == 20


@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_of_data_imports_no_module(tmp_path, monkeypatch, nested):
    folder = written(tmp_path)
    (tmp_path / "stranger.py").write_text("raise SystemExit('it ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    content = json.loads((folder.path / "features.json").read_text())
    feature = {"pythonClassName": "stranger.Feature"}
    content["featuresDict"]["features"]["label"] = (
        {"jsonFeature": {"json": json.dumps({"a": [feature]})}} if nested else feature
    )
    (folder.path / "features.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"class 'stranger.Feature', none of TFDS's own"):
        record_info(toys(tmp_path))
    assert "stranger" not in sys.modules


def test_records_are_read_once_they_are_finished(tmp_path):
    folder = RecordFolder(PLAN, tmp_path)
    write_shards(folder, [0, 2])
    with pytest.raises(UserError, match="1 shards are missing, first 1"):
        folder.finish()
    write_shards(folder, [1])
    with pytest.raises(UserError, match=r"unfinished, .* the same command goes on"):
        record_info(toys(tmp_path))
    assert not folder.finished
    folder.finish()
    assert folder.finished
    assert record_info(toys(tmp_path)).num_records == 20


CHANGES = {
    "tokenizer": "pixels", "tokenizer_digest": "ffff", "codebook_size": 999, "grid": (3, 2),
    "image_size": 16, "flips": False, "source": "folder dolls", "source_digest": "9876",
    "num_images": 11, "class_names": ("cat", "cow"), "shard_size": 5,
    "text": TEXT,
}  # fmt: skip


def test_records_of_another_plan_are_not_mixed(tmp_path):
    RecordFolder(PLAN, tmp_path)
    assert set(CHANGES) | {"name"} == {field.name for field in dataclasses.fields(RecordPlan)}
    for field, value in CHANGES.items():
        with pytest.raises(UserError) as error:
            RecordFolder(replace(PLAN, **{field: value}), tmp_path)
        there = json.dumps("nothing" if field == "text" else getattr(PLAN, field))
        here = json.dumps(value)
        here = here if len(here) <= 60 else f"{here[:60]} ..."
        differs = f"were begun with something else ({field} = {here}, there {there})"
        assert differs in str(error.value)


def test_another_data_set_is_not_written_into(tmp_path):
    (tmp_path / "toys/1.0.0").mkdir(parents=True)
    (tmp_path / "toys/1.0.0/dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds something else \(dataset_info.json\)"):
        RecordFolder(PLAN, tmp_path)


def test_a_name_that_tfds_cannot_read_back_is_refused(tmp_path):
    with pytest.raises(UserError, match="name = 'My-Toys', must be small letters"):
        RecordFolder(replace(PLAN, name="My-Toys"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_cannot_be_written_is_named_and_does_not_count(tmp_path):
    folder = RecordFolder(PLAN, tmp_path)
    (folder.path / "toys-train.array_record-00000-of-00003").mkdir()  # as a full disk would
    with pytest.raises(OSError, match="00000-of-00003"):
        write_shards(folder, [0])
    assert folder.missing() == [0, 1, 2]
