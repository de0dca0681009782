import json
import pathlib
import shutil
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from einops import rearrange

from enat_jax.config import Config, TextConfig, TokenizerConfig
from enat_jax.data import records as job_records
from enat_jax.data import tokenize as job
from enat_jax.data.batches import DataConfig, record_info
from enat_jax.data.images import ImageConfig, center_crop
from enat_jax.data.records import RecordFolder
from enat_jax.data.tokenize import compiled_encoder, tokenize
from enat_jax.errors import UserError
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.text.words import Words
from tests.support.images import LEVELS, LetterEncoder, Letters, Patches, noise, png
from tests.support.on_hosts import on_devices

GRID = (3, 3)


def placement(devices=1):
    return Placement.of(MeshConfig(), jax.devices()[:1] * devices)


def expected_tokens(number, flipped):
    crop = center_crop(noise(18, 20, number), 12)[:, :: -1 if flipped else 1]
    means = rearrange(crop[..., 0] / 255.0, "(y u) (x v) -> (y x) (u v)", u=4, v=4).mean(axis=1)
    return np.minimum(means * LEVELS, LEVELS - 1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """22 pictures of two classes, one of which is broken."""
    folder = tmp_path_factory.mktemp("images") / "pictures"
    for number in range(22):
        file = folder / ("ab"[number > 8]) / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number)[: 300 if number == 10 else None])
    return ImageConfig(folder=str(folder), max_unreadable=0.1, shard_size=6)


def config(images, data_dir, name="pictures", grid=GRID, reader="none"):
    data, text = DataConfig(name=name, data_dir=str(data_dir)), TextConfig(name=reader)
    return Config(images=images, data=data, tokenizer=TokenizerConfig(grid=grid), text=text)


def run(images, data_dir, *, grid=GRID, reader="none", tokenizer=None, log=None, **options):
    """Tokenizes with what most tests do not care about; returns the files."""
    options = {"placement": placement(), "batch_size": 4,
               "log": [].append if log is None else log.append, **options}  # fmt: skip
    cfg = config(images, data_dir, grid=grid, reader=reader)
    tokenize(cfg, tokenizer or Patches(), **options)
    return contents(data_dir)


def contents(data_dir):
    folder = data_dir / "pictures/1.0.0"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def records(data_dir):
    builder = tfds.builder_from_directory(data_dir / "pictures/1.0.0")
    return list(builder.as_data_source("train"))


@pytest.fixture(scope="module")
def unbroken(pictures, tmp_path_factory):
    """What one run without interruption writes: names and bytes."""
    return run(pictures, tmp_path_factory.mktemp("unbroken"))


class TestRecords:
    def test_they_are_the_tokens_of_each_image_and_its_mirror_image(self, pictures, tmp_path):
        run(pictures, tmp_path)
        written = records(tmp_path)
        numbers = [number for number in range(22) if number != 10]
        assert len(written) == 2 * len(numbers)
        for index, record in enumerate(written):
            number, flipped = numbers[index // 2], bool(index % 2)
            assert (record["label"], record["flipped"]) == (number > 8, flipped)
            levels = expected_tokens(number, flipped)
            assert np.abs(record["tokens"] - (levels - 0.5)).max() <= 0.5 + 1e-4
        info = record_info(DataConfig(name="pictures", data_dir=str(tmp_path)))
        assert (info.tokenizer, info.tokenizer_digest) == ("patches", "abcd")
        assert (info.grid, info.codebook_size) == (GRID, LEVELS)
        assert (info.class_names, info.num_records) == (("a", "b"), 42)

    def test_mirror_images_can_be_left_out(self, pictures, tmp_path):
        run(pictures, tmp_path / "both")
        run(replace(pictures, flips=False), tmp_path / "one")
        both, one = records(tmp_path / "both"), records(tmp_path / "one")
        assert [r["tokens"].tolist() for r in one] == [r["tokens"].tolist() for r in both[::2]]
        assert not any(r["flipped"] for r in one)

    def test_a_run_may_be_of_any_batch_size(self, pictures, unbroken, tmp_path):
        assert run(pictures, tmp_path, batch_size=7) == unbroken


class Killed(BaseException):
    """The process ends here."""


def before(name):
    """Kills a run before a file gets its name."""
    replace = pathlib.Path.replace

    def killed(path, target):
        if target.name == name:
            raise Killed
        return replace(path, target)

    return mock.patch.object(pathlib.Path, "replace", killed)


class Writer(job_records.ArrayRecordWriter):
    """Kills a run at its 30th record."""

    written = 0

    def write(self, record):
        Writer.written += 1
        if Writer.written == 30:
            raise Killed
        super().write(record)


POINTS = {  # and the shards that are complete then
    "plan": (lambda: before("plan.json"), 0),
    "record": (lambda: mock.patch.object(job_records, "ArrayRecordWriter", Writer), 2),
    "shard": (lambda: before("pictures-train.array_record-00002-of-00004"), 2),
    "description": (lambda: before("shard-00001.json"), 1),
    "last": (lambda: before("dataset_info.json"), 4),
}


def kill(point, pictures, data_dir):
    Writer.written = 0
    with POINTS[point][0](), pytest.raises(Killed):
        run(pictures, data_dir)


@pytest.fixture
def begun(pictures, tmp_path):
    """A folder whose last two shards are missing."""
    kill("record", pictures, tmp_path)
    return tmp_path


class TestInterruptedRuns:
    @pytest.mark.parametrize("point", POINTS)
    def test_one_that_was_killed_ends_up_the_same(self, pictures, unbroken, point, tmp_path):
        kill(point, pictures, tmp_path)
        assert "dataset_info.json" not in contents(tmp_path)
        logged, complete = [], POINTS[point][1]
        assert run(pictures, tmp_path, log=logged) == unbroken
        assert not list(tmp_path.glob("*/*/.*"))
        assert logged[0].endswith(f"; {complete} of 4 shards are there" if complete else "1.0.0")

    def test_complete_shards_are_not_made_again(self, pictures, begun, monkeypatch):
        shards, write = [], RecordFolder.write
        monkeypatch.setattr(
            RecordFolder, "write", lambda *args: shards.append(args[1]) or write(*args)
        )
        run(pictures, begun)
        assert shards == [2, 3]
        logged = []
        run(pictures, begun, log=logged)
        (line,) = logged
        assert "is complete already: 1 images were skipped" in line

    @pytest.mark.parametrize(
        ("options", "images", "message"),
        [
            ({"tokenizer": Patches(digest="ffff")}, {}, 'digest = "ffff", there "abcd"'),
            ({"grid": (2, 2)}, {}, r"grid = \[2, 2\], there \[3, 3\]; image_size = 8, there 12"),
            ({}, {"shard_size": 7}, "shard_size = 7, there 6"),
            ({}, {"max_unreadable": 0.0}, "1 of 22 images are unreadable so far"),
        ],
    )
    def test_other_records_are_refused_at_once(self, pictures, begun, options, images, message):
        files = contents(begun)
        with pytest.raises(UserError, match=message):
            run(replace(pictures, **images), begun, **options)
        assert contents(begun) == files


ON_FOUR_DEVICES = """
from enat_jax.config import Config, DataConfig, ImageConfig, TokenizerConfig
from enat_jax.data.tokenize import tokenize
from enat_jax.parallel.placement import MeshConfig, Placement
from tests.support.images import Patches
images = ImageConfig(folder=arguments[0], max_unreadable=0.1, shard_size=6)
data = DataConfig(name="pictures", data_dir=arguments[1])
assert len(jax.devices()) == 4
tokenize(Config(images=images, data=data, tokenizer=TokenizerConfig(grid=(3, 3))), Patches(),
         batch_size=4, placement=Placement.of(MeshConfig()))
"""


class TestManyDevices:
    def test_they_make_the_same(self, pictures, unbroken, tmp_path):
        on_devices(ON_FOUR_DEVICES, pictures.folder, tmp_path, devices=4)
        assert contents(tmp_path) == unbroken

    def test_processes_share_the_shards(self, pictures, unbroken, tmp_path, monkeypatch):
        monkeypatch.setattr(job, "all_gather_text", lambda text: None)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        for process, complete in ((1, [1, 3]), (0, [0, 1, 2, 3])):
            describe = (lambda finish: finish()) if process == 0 else (lambda finish: 42)
            monkeypatch.setattr(job, "from_primary", describe)
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            files = run(pictures, tmp_path)
            assert [s for s in range(4) if f"shard-0000{s}.json" in files] == complete
        assert files == unbroken


class TestUnreadableImages:
    def test_they_are_named_and_counted(self, pictures, tmp_path):
        logged = []
        files = run(pictures, tmp_path, log=logged)
        where = f"{tmp_path}/pictures/1.0.0"
        first, skipped, last = logged
        assert first == (
            f"22 images of 2 classes in folder pictures, to 3 x 3 tokens of patches in {where}"
        )
        assert skipped == "skipped b/10.png: image file is truncated"
        assert last.startswith(f"22 images, 1 skipped, 42 records in {where}; ")
        assert last.endswith(" images/s")
        reasons = json.loads(files["shard-00001.json"])["skipped"]
        assert reasons == {"b/10.png": "image file is truncated"}

    def test_too_many_stop_the_run_and_a_higher_limit_goes_on(self, pictures, unbroken, tmp_path):
        strict = replace(pictures, max_unreadable=0.04)  # of 22 it is less than one
        with pytest.raises(UserError, match=r"1 of 22 images are .* max_unreadable = 0.04 allows"):
            run(strict, tmp_path)
        assert [n for n in contents(tmp_path) if n.startswith("shard")] == ["shard-00000.json"]
        assert run(pictures, tmp_path) == unbroken


@pytest.fixture
def captioned(pictures, tmp_path):
    """The same pictures, number i with 1 + i % 2 captions; none names a side."""
    folder = tmp_path / "captioned"
    shutil.copytree(pictures.folder, folder)
    for file in folder.glob("*/*.png"):
        captions = [f"picture {int(file.stem) % 5}", "another caption"][: 1 + int(file.stem) % 2]
        file.with_suffix(".txt").write_text("\n".join(captions))
    return replace(pictures, folder=str(folder), captions="beside")


class TestCaptions:
    def test_each_image_and_its_mirror_image_have_its_captions_and_their_ids(
        self, captioned, tmp_path
    ):
        logged = []
        run(captioned, tmp_path, reader="words", log=logged)
        assert logged[0] == "8 different words in all captions, 2 read of one at most"
        assert logged[1].startswith("22 captioned images in folder captioned, to 3 x 3 tokens")
        assert logged[2] == (
            "mirror images have their originals' captions; 0 of 22 images have a caption with the"
            " word left or right"
        )
        written, numbers = records(tmp_path), [number for number in range(22) if number != 10]
        info = record_info(DataConfig(name="pictures", data_dir=str(tmp_path)))
        words = Words(tuple(info.text["words"]), info.text["length"])
        assert info.text == {
            "name": "words", "digest": words.digest, "length": 2, "vocabulary": 9,
            "words": ["0", "1", "2", "3", "4", "another", "caption", "picture"],
        }  # fmt: skip
        assert [record["flipped"] for record in written] == [False, True] * len(numbers)
        for index, record in enumerate(written):
            number = numbers[index // 2]
            captions = [f"picture {number % 5}", "another caption"][: 1 + number % 2]
            assert [each.decode() for each in record["captions"]] == captions
            np.testing.assert_array_equal(np.stack(record["caption_ids"]), words(captions))

    def test_a_tokenizer_that_was_loaded_reads_them_all_in_any_batches(self, captioned, tmp_path):
        options = {"reader": "clip", "text": Letters(), "encoder": LetterEncoder("aa")}
        files = run(captioned, tmp_path / "a", **options)
        assert run(captioned, tmp_path / "b", batch_size=7, **options) == files
        info = record_info(DataConfig(name="pictures", data_dir=str(tmp_path / "a")))
        assert info.text == {
            "name": "clip", "digest": "ffee", "length": 3, "vocabulary": 100, "encoder_digest": "aa"
        }  # fmt: skip
        for record in records(tmp_path / "a"):
            ids = [[len(each), 0, 0] for each in record["captions"]]
            assert np.stack(record["caption_ids"]).tolist() == ids

    def test_a_run_that_was_killed_ends_up_the_same(self, captioned, tmp_path):
        whole = run(captioned, tmp_path / "a", reader="words")
        Writer.written = 0
        with POINTS["record"][0](), pytest.raises(Killed):
            run(captioned, tmp_path / "b", reader="words")
        assert run(captioned, tmp_path / "b", reader="words") == whole
        with pytest.raises(UserError, match=r'text.name = "clip", there "words"'):
            run(captioned, tmp_path / "b", reader="clip", text=Letters())

    @pytest.mark.parametrize(
        ("flips", "orientations", "said"),
        [
            ("auto", 1, "1 of 22 images have a caption with the word left or right: no mirror"),
            (True, 2, "mirror images have their originals' captions; 1 of 22 images have"),
            (False, 1, None),
        ],
    )
    def test_mirror_images_are_left_out_where_captions_name_sides(
        self, captioned, tmp_path, flips, orientations, said
    ):
        (pathlib.Path(captioned.folder) / "a/03.txt").write_text("bright, facing LEFT.")
        logged = []
        run(replace(captioned, flips=flips), tmp_path, reader="words", log=logged)
        assert len(records(tmp_path)) == 21 * orientations
        assert [line.startswith(said or "") for line in logged if "left or right" in line] == (
            [True] if said else []
        )

    def test_classes_or_captions_must_be_what_the_config_reads(self, pictures, captioned, tmp_path):
        with pytest.raises(UserError, match=r"text.name = 'none' does not fit .*, without classes"):
            run(captioned, tmp_path / "x")
        for reader in ("words", "clip"):
            with pytest.raises(UserError, match=f"{reader}' does not fit .*, without captions"):
                run(pictures, tmp_path / "x", reader=reader, text=Letters())
        (pathlib.Path(captioned.folder) / "a/03.txt").unlink()
        with pytest.raises(UserError, match=r"images without captions: a/03.png"):
            run(captioned, tmp_path / "x", reader="words")
        assert not (tmp_path / "x").exists()


def test_pixels_reach_the_tokenizer_between_0_and_1_and_mirrored():
    class Seen(Patches):
        def encode(self, params, images):
            return jnp.rint(images[:, ::4, ::4, 0].reshape(len(images), -1) * 255).astype(jnp.int32)

    images = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)
    images[0, 0, 0], images[0, 0, 4] = 0, 255
    token_ids = np.asarray(compiled_encoder(Seen(), True, placement())(images))
    assert token_ids.shape == (2, 2, 9)
    np.testing.assert_array_equal(token_ids[:, 0], images[:, ::4, ::4, 0].reshape(2, 9))
    np.testing.assert_array_equal(token_ids[:, 1], images[:, ::4, ::-4, 0].reshape(2, 9))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digits", {}, "data.name = 'digits' is a data set of the project's own"),
        ("x", {"grid": (3, 4)}, "tokenizer.grid = 3 x 4, must be square"),
        ("x", {"images": ImageConfig(folder="nowhere")}, "no such folder"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_and_leave_nothing(
    pictures, name, options, message, tmp_path
):
    cfg = config(**{"images": pictures, "data_dir": tmp_path, "name": name} | options)
    with pytest.raises(UserError, match=message):
        tokenize(cfg, Patches(), batch_size=4, placement=placement())
    assert list(tmp_path.iterdir()) == []
