import io
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from einops import rearrange, reduce, repeat
from PIL import Image

from enat_jax.data import tokenize as tokenize_dataset
from enat_jax.data.batches import DataConfig, record_info
from enat_jax.data.crops import center_crop
from enat_jax.data.image_source import ImageConfig, ImageError
from enat_jax.data.record_plan import RecordPlan, RecordsError
from enat_jax.data.records import RecordFolder
from enat_jax.data.tokenize import (
    TokenizeError,
    compiled_encoder,
    tokenize,
)
from enat_jax.parallel.placement import MeshConfig, Placement

LEVELS = 50
GRID = (3, 3)


@dataclass(frozen=True)
class Patches:
    """One token per 4 x 4 pixels: their mean red, in 50 levels."""

    name: str = "patches"
    digest: str = "abcd"
    codebook_size: int = LEVELS
    patch: int = 4
    params: tuple = ()

    def encode(self, params, images):
        means = reduce(images[..., 0], "b (y u) (x v) -> b (y x)", "mean", u=4, v=4)
        return jnp.minimum(means * LEVELS, LEVELS - 1).astype(jnp.int32)

    def decode(self, params, token_ids, grid):
        greys = (token_ids + 0.5) / LEVELS
        return repeat(greys, "b (y x) -> b (y u) (x v) 3", y=grid[0], x=grid[1], u=4, v=4)


def picture(seed, size=(20, 18)):
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(values)


def expected_tokens(image, flipped):
    crop = center_crop(image, 12)[:, :: -1 if flipped else 1]
    means = rearrange(crop[..., 0] / 255.0, "(y u) (x v) -> (y x) (u v)", u=4, v=4).mean(axis=1)
    return np.minimum(means * LEVELS, LEVELS - 1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """22 pictures of two classes, one of which is broken."""
    folder = tmp_path_factory.mktemp("images") / "pictures"
    for number in range(22):
        file = folder / ("ab"[number > 8]) / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(file)
    broken = folder / "b/10.png"
    broken.write_bytes(broken.read_bytes()[:300])
    return ImageConfig(folder=str(folder), max_unreadable=0.1, shard_size=6)


def run(images, data_dir, *, tokenizer=None, batch_size=4, devices=1, said=None, **options):
    """Tokenizes with what most tests do not care about."""
    options = {
        "grid": GRID,
        "placement": Placement.of(MeshConfig(), jax.devices()[:1] * devices),
    } | options
    tokenize(
        images,
        tokenizer or Patches(),
        "pictures",
        data_dir,
        batch_size=batch_size,
        say=[].append if said is None else said.append,
        **options,
    )
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
        found = records(tmp_path)
        numbers = [number for number in range(22) if number != 10]
        assert len(found) == 2 * len(numbers)
        for index, record in enumerate(found):
            number, flipped = numbers[index // 2], bool(index % 2)
            assert (record["label"], record["flipped"]) == (number > 8, flipped)
            levels = expected_tokens(picture(number), flipped)
            assert np.abs(record["tokens"] - (levels - 0.5)).max() <= 0.5 + 1e-4

    def test_mirror_images_can_be_left_out(self, pictures, tmp_path):
        run(pictures, tmp_path / "both")
        run(replace(pictures, flips=False), tmp_path / "one")
        both, one = records(tmp_path / "both"), records(tmp_path / "one")
        assert [r["tokens"].tolist() for r in one] == [r["tokens"].tolist() for r in both[::2]]
        assert not any(r["flipped"] for r in one)

    def test_they_say_what_they_were_made_with(self, pictures, tmp_path):
        run(pictures, tmp_path)
        info = record_info(DataConfig(name="pictures", data_dir=str(tmp_path)))
        assert (info.tokenizer, info.tokenizer_digest) == ("patches", "abcd")
        assert (info.grid, info.codebook_size) == (GRID, LEVELS)
        assert (info.class_names, info.num_records) == (("a", "b"), 42)

    def test_they_can_come_from_a_data_set(self, pictures, tmp_path):
        class Prepared(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(),
                    "label": tfds.features.ClassLabel(names=["a", "b"]),
                }
                features = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(
                    builder=self, features=features, disable_shuffling=True
                )

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for number in range(22):
                    file = io.BytesIO()
                    picture(number).save(file, "PNG")
                    data = file.getvalue()[: 300 if number == 10 else None]
                    yield number, {"image": data, "label": int(number > 8)}

        Prepared(data_dir=tmp_path, file_format="array_record").download_and_prepare()
        images = replace(pictures, folder="", name="prepared", data_dir=str(tmp_path))
        said = []
        run(images, tmp_path, said=said)
        run(pictures, tmp_path / "folder")
        for ours, theirs in zip(records(tmp_path), records(tmp_path / "folder"), strict=True):
            assert str(ours) == str(theirs)
        assert said[1].startswith("skipped record 10 of prepared/1.0.0, split train: ")

    def test_a_run_may_be_of_any_batch_size(self, pictures, unbroken, tmp_path):
        assert run(pictures, tmp_path, batch_size=7) == unbroken


# Runs that are killed at some point, each in a process of its own, and one on four devices.
ELSEWHERE = """
import os, pathlib, signal, sys
from unittest import mock
import jax
from enat_jax.data.batches import records
from enat_jax.data.image_source import ImageConfig
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.data.tokenize import tokenize
from tests.data.test_tokenize import GRID, Patches

images = ImageConfig(folder=sys.argv[1], max_unreadable=0.1, shard_size=6)
out = pathlib.Path(sys.argv[2])

def run(folder, **options):
    placement = Placement.of(MeshConfig())
    tokenize(images, Patches(), "pictures", folder, grid=GRID, batch_size=4, placement=placement)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def before(name):
    replace = pathlib.Path.replace
    def killed(path, target):
        return die() if target.name == name else replace(path, target)
    return mock.patch.object(pathlib.Path, "replace", killed)

class Writer(records.ArrayRecordWriter):
    written = 0
    def write(self, record):
        Writer.written += 1
        return die() if Writer.written == 30 else super().write(record)

points = {
    "plan": before("plan.json"),
    "record": mock.patch.object(records, "ArrayRecordWriter", Writer),
    "shard": before("pictures-train.array_record-00002-of-00004"),
    "description": before("shard-00001.json"),
    "last": before("dataset_info.json"),
}
for name, point in points.items():
    child = os.fork()
    if child == 0:
        with point:
            run(out / name)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, name
assert len(jax.devices()) == 4
run(out / "devices")
"""
KILLED = {"plan": 0, "record": 2, "shard": 2, "description": 1, "last": 4}  # whole shards


@pytest.fixture(scope="module")
def elsewhere(pictures, tmp_path_factory):
    """The folders that those runs leave; tests that go on from there take a copy."""
    out = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, pictures.folder, str(out)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ".", "PATH": "", "JAX_PLATFORMS": "cpu",
             "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


class TestInterruptedRuns:
    @pytest.mark.parametrize("point", KILLED)
    def test_one_that_was_killed_ends_up_the_same(
        self, pictures, unbroken, elsewhere, point, tmp_path
    ):
        shutil.copytree(elsewhere / point, tmp_path, dirs_exist_ok=True)
        assert "dataset_info.json" not in contents(tmp_path)
        assert ("features.json" in contents(tmp_path)) == (point == "last")
        said = []
        assert run(pictures, tmp_path, said=said) == unbroken
        assert not list(tmp_path.glob("*/*/.*"))
        resumed = f"; {KILLED[point]} of 4 shards are there"
        assert said[0].endswith(resumed) or (KILLED[point] == 0 and "shards" not in said[0])

    def test_whole_shards_are_not_made_again(self, pictures, elsewhere, tmp_path, monkeypatch):
        shutil.copytree(elsewhere / "record", tmp_path, dirs_exist_ok=True)
        written = []
        write = RecordFolder.write
        monkeypatch.setattr(
            RecordFolder, "write", lambda *args: (written.append(args[1]), write(*args))
        )
        run(pictures, tmp_path)
        assert written == [2, 3]

    def test_what_is_done_is_left_alone(self, pictures, tmp_path):
        run(pictures, tmp_path)
        said = []
        run(pictures, tmp_path, said=said)
        assert len(said) == 1
        assert "is whole already: 1 images were skipped" in said[0]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tokenizer": Patches(digest="ffff")}, 'tokenizer_digest = "ffff", there "abcd"'),
            ({"grid": (2, 2)}, r"grid = \[2, 2\], there \[3, 3\]; image_size = 8, there 12"),
        ],
    )
    def test_another_tokenizer_or_size_is_refused(
        self, pictures, elsewhere, change, message, tmp_path
    ):
        shutil.copytree(elsewhere / "record", tmp_path, dirs_exist_ok=True)
        before = contents(tmp_path)
        with pytest.raises(RecordsError, match=message):
            run(pictures, tmp_path, **change)
        assert contents(tmp_path) == before

    def test_other_shards_are_refused(self, pictures, elsewhere, tmp_path):
        shutil.copytree(elsewhere / "record", tmp_path, dirs_exist_ok=True)
        with pytest.raises(RecordsError, match="shard_size = 7, there 6"):
            run(replace(pictures, shard_size=7), tmp_path)


class TestManyDevices:
    def test_they_make_the_same(self, unbroken, elsewhere):
        assert contents(elsewhere / "devices") == unbroken

    def test_processes_share_the_shards(self, pictures, unbroken, tmp_path, monkeypatch):
        barriers = []
        monkeypatch.setattr(
            tokenize_dataset.multihost_utils, "sync_global_devices", barriers.append
        )
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        for process, whole in ((1, [1, 3]), (0, [0, 1, 2, 3])):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            found = run(pictures, tmp_path)
            assert [s for s in range(4) if f"shard-0000{s}.json" in found] == whole
        assert found == unbroken
        assert barriers == 2 * ["pictures: all shards are there", "pictures: described"]

    def test_a_batch_that_they_cannot_share_is_refused(self, pictures, tmp_path):
        with pytest.raises(TokenizeError, match="batch_size = 4, must be a multiple of 3 devices"):
            run(pictures, tmp_path, devices=3)


class TestUnreadableImages:
    def test_they_are_named_and_counted(self, pictures, tmp_path):
        said = []
        files = run(pictures, tmp_path, said=said)
        assert said[0] == (
            "22 images of 2 classes in folder pictures, to 3 x 3 tokens of patches in"
            f" {tmp_path}/pictures/1.0.0"
        )
        assert said[1].startswith("skipped b/10.png: ")
        assert "truncated" in said[1]
        assert said[2].startswith("22 images, 1 skipped, 42 records in ")
        assert said[2].endswith(" images/s")
        assert len(said) == 3
        skipped = json.loads(files["shard-00001.json"])["skipped"]
        assert list(skipped) == ["b/10.png"]

    def test_too_many_stop_the_run_and_a_higher_limit_goes_on(self, pictures, unbroken, tmp_path):
        strict = replace(pictures, max_unreadable=0.04)
        for _ in range(2):  # 0.04 of 22 are less than one
            with pytest.raises(
                TokenizeError, match=r"1 of 22 images are unreadable so far, more than "
                "max_unreadable = 0.04 allows"
            ):  # fmt: skip
                run(strict, tmp_path)
            assert [n for n in contents(tmp_path) if n.startswith("shard")] == ["shard-00000.json"]
        assert run(pictures, tmp_path) == unbroken

    def test_those_of_earlier_runs_count(self, pictures, elsewhere, tmp_path):
        shutil.copytree(elsewhere / "record", tmp_path, dirs_exist_ok=True)
        before = contents(tmp_path)
        with pytest.raises(TokenizeError, match="1 of 22 images are unreadable"):
            run(replace(pictures, max_unreadable=0.0), tmp_path)
        assert contents(tmp_path) == before, "it stopped at once"


def test_progress_is_said_where_there_is_no_terminal(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_dataset, "_SECONDS", 0)
    said = []
    run(pictures, tmp_path, said=said)
    lines = [line for line in said if "min left" in line]
    assert [line.split()[0] for line in lines] == [
        "4/22",
        "6/22",
        "10/22",
        "12/22",
        "16/22",
        "18/22",
    ]
    assert all("images/s" in line for line in lines)


def test_pixels_reach_the_tokenizer_between_0_and_1():
    class Seen(Patches):
        def encode(self, params, images):
            return jnp.rint(images[:, ::4, ::4, 0].reshape(len(images), -1) * 255).astype(jnp.int32)

    plan = RecordPlan("x", "seen", "", 256, GRID, 12, True, "", "", 1, ("a",), 1)
    images = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)
    images[0, 0, 0], images[0, 0, 4] = 0, 255
    encode = compiled_encoder(Seen(), plan, 2, Placement.of(MeshConfig(), jax.devices()[:1]))
    found = np.asarray(encode(images))
    assert found.shape == (2, 2, 9)
    np.testing.assert_array_equal(found[:, 0], images[:, ::4, ::4, 0].reshape(2, 9))
    np.testing.assert_array_equal(found[:, 1], images[:, ::4, ::-4, 0].reshape(2, 9))


def test_weights_are_passed_to_the_program_and_not_written_into_it():
    class Shifted(Patches):
        def encode(self, params, images):
            return super().encode((), images) + params[0, 0]

    tokenizer = Shifted(params=jnp.full((500, 500), 7))
    plan = RecordPlan("x", "seen", "", 99, GRID, 12, True, "", "", 1, ("a",), 1)
    placement = Placement.of(MeshConfig(), jax.devices()[:1])
    images = np.zeros((2, 12, 12, 3), np.uint8)
    assert np.all(np.asarray(compiled_encoder(tokenizer, plan, 2, placement)(images)) == 7)
    text = jax.jit(tokenizer.encode).lower(tokenizer.params, images / 255).as_text()
    assert len(text) < 20000  # of 250,000 numbers


def test_token_ids_beyond_the_codebook_are_refused(pictures, tmp_path):
    with pytest.raises(
        TokenizeError, match=r"patches gave token ids in \[.*\], must lie in \[0, 9\)"
    ):
        run(pictures, tmp_path, tokenizer=Patches(codebook_size=9))
    assert not [name for name in contents(tmp_path) if name.startswith("shard")]


def test_another_number_of_tokens_than_the_grid_has_is_refused(pictures, tmp_path):
    with pytest.raises(TokenizeError, match="patches gave 36 tokens, the grid has 9"):
        run(pictures, tmp_path, tokenizer=Patches(patch=8))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("digits", {}, "out_name = 'digits' is a data set of the project's own"),
        ("x", {"grid": (3, 4)}, "grid = 3 x 4, must be square"),
        ("x", {"batch_size": 0}, "batch_size = 0, must be a multiple of 1 devices"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(pictures, name, change, message, tmp_path):
    placement = Placement.of(MeshConfig(), jax.devices()[:1])
    options = {"grid": GRID, "batch_size": 4, "placement": placement} | change
    with pytest.raises(TokenizeError, match=message):
        tokenize(pictures, Patches(), name, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_images_that_cannot_be_opened_leave_nothing(tmp_path):
    with pytest.raises(ImageError, match="no such folder"):
        run(ImageConfig(folder=str(tmp_path / "nowhere")), tmp_path / "data")
    assert list(tmp_path.iterdir()) == []
